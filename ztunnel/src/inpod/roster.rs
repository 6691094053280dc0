//! The snapshot rule of the node agent's protocol, without I/O: pods the agent did not name before
//! it said that its snapshot was complete are gone.

use std::collections::HashSet;

/// What one connection to the agent has named so far.
#[derive(Debug)]
pub struct Roster {
    /// `None` after the snapshot: from then on pods go only when named in a `del`.
    named: Option<HashSet<String>>,
}

impl Default for Roster {
    fn default() -> Self {
        Self {
            named: Some(HashSet::new()),
        }
    }
}

impl Roster {
    /// The agent named a pod, to add or to keep.
    pub fn told_of(&mut self, uid: &str) {
        if let Some(named) = &mut self.named {
            named.insert(uid.to_owned());
        }
    }

    /// The agent has named all its pods; answers which of those served it did not.
    pub fn snapshot_complete<'a>(
        &mut self,
        served: impl Iterator<Item = &'a String>,
    ) -> Vec<String> {
        let Some(named) = self.named.take() else {
            return vec![];
        };
        served
            .filter(|uid| !named.contains(*uid))
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_not_named_in_the_snapshot_are_gone() {
        let served = ["a".to_owned(), "b".to_owned(), "c".to_owned()];
        let mut roster = Roster::default();
        roster.told_of("a");
        roster.told_of("new");
        roster.told_of("c");
        assert_eq!(roster.snapshot_complete(served.iter()), ["b"]);
    }

    #[test]
    fn a_second_snapshot_mark_removes_nothing() {
        let mut roster = Roster::default();
        let none: [String; 0] = [];
        roster.snapshot_complete(none.iter());
        roster.told_of("late");
        assert!(roster
            .snapshot_complete(["late".to_owned()].iter())
            .is_empty());
    }
}
