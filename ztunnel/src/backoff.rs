//! Pauses between attempts: doubling up to a limit, each shortened by chance so that many proxies
//! do not return to a recovering server at the same moment.

use std::time::Duration;

/// The longest step towards a server that takes no connection: an attempt costs nobody anything,
/// and whoever starts beside it should not wait long after it.
pub const WHILE_ABSENT: Duration = Duration::from_secs(1);

/// A sequence of pauses; forgets its past with [`Backoff::reset`].
#[derive(Debug)]
pub struct Backoff {
    first: Duration,
    limit: Duration,
    current: Duration,
}

impl Backoff {
    pub fn new(first: Duration, limit: Duration) -> Self {
        Self {
            first,
            limit,
            current: first,
        }
    }

    /// The next pause, between half of the current step and the whole of it.
    pub fn next(&mut self) -> Duration {
        let step = self.current;
        self.current = (step * 2).min(self.limit);
        step.mul_f64(rand::random_range(0.5..=1.0))
    }

    /// As [`Backoff::next`], with steps of at most `limit`.
    pub fn next_within(&mut self, limit: Duration) -> Duration {
        self.current = self.current.min(limit);
        self.next().min(limit)
    }

    /// After a success: begin again with the first step.
    pub fn reset(&mut self) {
        self.current = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_limit_and_start_again() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        for whole in [100, 200, 400, 800, 1000, 1000] {
            let pause = backoff.next();
            assert!(pause >= Duration::from_millis(whole / 2), "{pause:?}");
            assert!(pause <= Duration::from_millis(whole), "{pause:?}");
        }
        for _ in 0..3 {
            assert!(backoff.next_within(Duration::from_millis(300)) <= Duration::from_millis(300));
        }
        backoff.reset();
        assert!(backoff.next() <= Duration::from_millis(100));
    }
}
