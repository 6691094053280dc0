//! DNS messages (RFC 1035) as far as answering needs them: one question in, addresses out. What a
//! query asks beyond that is passed on as it came.

use std::net::IpAddr;

pub const A: u16 = 1;
pub const AAAA: u16 = 28;
const INTERNET: u16 = 1;
const OPT: u16 = 41;
const HEADER: usize = 12;
/// The longest name in the wire's form.
const LONGEST_NAME: usize = 255;
/// What fits into a datagram if the client does not say more (RFC 1035, 4.2.1).
pub const SMALLEST_DATAGRAM: usize = 512;
/// More is not sent, whatever the client takes: it would be cut into fragments.
const LARGEST_DATAGRAM: usize = 1232;

/// An answer's verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    Success = 0,
    ServerFailure = 2,
}

/// One understood query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    pub id: u16,
    /// Lower case, without the final dot.
    pub name: String,
    pub kind: u16,
    recursion_desired: bool,
    /// The question in the wire's form, to be repeated in the answer.
    question: Vec<u8>,
    /// Bytes a datagram to the client may have.
    pub datagram: usize,
    extended: bool,
}

impl Query {
    /// Reads a query with one question of the Internet class; `None` for anything else.
    pub fn parse(message: &[u8]) -> Option<Self> {
        let header = message.get(..HEADER)?;
        let number = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let flags = number(2);
        let (response, operation) = (flags >> 15, (flags >> 11) & 0xF);
        if response != 0 || operation != 0 || number(4) != 1 {
            return None;
        }
        let mut position = HEADER;
        let mut name = String::new();
        loop {
            let length = usize::from(*message.get(position)?);
            position += 1;
            if length == 0 {
                break;
            }
            // A pointer has nothing to point to in a question.
            if length > 63 || position + length - HEADER > LONGEST_NAME {
                return None;
            }
            let label = message.get(position..position + length)?;
            if !name.is_empty() {
                name.push('.');
            }
            for byte in label {
                // Names with other bytes are none of ours.
                if !byte.is_ascii_graphic() || *byte == b'.' {
                    return None;
                }
                name.push(char::from(byte.to_ascii_lowercase()));
            }
            position += length;
        }
        let fields = message.get(position..position + 4)?;
        let kind = u16::from_be_bytes([fields[0], fields[1]]);
        let class = u16::from_be_bytes([fields[2], fields[3]]);
        if class != INTERNET {
            return None;
        }
        let question = message[HEADER..position + 4].to_vec();
        let answers = usize::from(number(6)) + usize::from(number(8));
        let extension = (answers == 0 && number(10) > 0)
            .then(|| extension(&message[position + 4..]))
            .flatten();
        Some(Self {
            id: number(0),
            name,
            kind,
            recursion_desired: flags & 0x0100 != 0,
            question,
            datagram: extension.map_or(SMALLEST_DATAGRAM, |size| {
                usize::from(size).clamp(SMALLEST_DATAGRAM, LARGEST_DATAGRAM)
            }),
            extended: extension.is_some(),
        })
    }

    /// An answer with the addresses of the family asked for, cut to `limit` bytes; then it says
    /// so, and the client asks again over TCP.
    pub fn answer(&self, code: Code, addresses: &[IpAddr], seconds: u32, limit: usize) -> Vec<u8> {
        const RESPONSE: u16 = 0x8000;
        const AUTHORITATIVE: u16 = 0x0400;
        const TRUNCATED: u16 = 0x0200;
        const RECURSION_AVAILABLE: u16 = 0x0080;
        let mut message = Vec::with_capacity(SMALLEST_DATAGRAM);
        message.extend([0; HEADER]);
        message.extend(&self.question);
        let closing: &[u8] = if self.extended {
            // Root, OPT, the size taken, no flags, no data.
            &[0, 0, 41, 0x04, 0xD0, 0, 0, 0, 0, 0, 0]
        } else {
            &[]
        };
        let (mut count, mut flags) = (0u16, RESPONSE | AUTHORITATIVE | RECURSION_AVAILABLE);
        if self.recursion_desired {
            flags |= 0x0100;
        }
        for address in addresses {
            let octets: &[u8] = match (self.kind, address) {
                (A, IpAddr::V4(four)) => &four.octets(),
                (AAAA, IpAddr::V6(six)) => &six.octets(),
                _ => continue,
            };
            if message.len() + 12 + octets.len() + closing.len() > limit {
                flags |= TRUNCATED;
                break;
            }
            // The name is the question's, by pointer.
            message.extend([0xC0, HEADER as u8]);
            message.extend(self.kind.to_be_bytes());
            message.extend(INTERNET.to_be_bytes());
            message.extend(seconds.to_be_bytes());
            message.extend((octets.len() as u16).to_be_bytes());
            message.extend(octets);
            count += 1;
        }
        message.extend(closing);
        message[0..2].copy_from_slice(&self.id.to_be_bytes());
        message[2..4].copy_from_slice(&(flags | code as u16).to_be_bytes());
        message[4..6].copy_from_slice(&1u16.to_be_bytes());
        message[6..8].copy_from_slice(&count.to_be_bytes());
        message[10..12].copy_from_slice(&u16::from(self.extended).to_be_bytes());
        message
    }
}

/// The datagram size of an OPT record (RFC 6891) that comes first among the additional ones.
fn extension(records: &[u8]) -> Option<u16> {
    let record = records.get(..11)?;
    let kind = u16::from_be_bytes([record[1], record[2]]);
    (record[0] == 0 && kind == OPT).then(|| u16::from_be_bytes([record[3], record[4]]))
}

/// Shortens a response for a client that takes no more than `limit` bytes: the header and the
/// question, and that there is more.
pub fn shortened(response: &[u8], limit: usize) -> Vec<u8> {
    if response.len() <= limit {
        return response.to_vec();
    }
    let mut position = HEADER;
    while let Some(length) = response.get(position) {
        position += 1 + usize::from(*length);
        if *length == 0 || *length > 63 {
            break;
        }
    }
    let end = (position + 4).min(response.len()).min(limit);
    let mut short = response[..end].to_vec();
    if short.len() >= HEADER {
        short[2] |= 0x02;
        short[6..12].fill(0);
    }
    short
}

#[cfg(test)]
pub mod tests {
    use super::*;

    fn truncated(response: &[u8]) -> bool {
        response[2] & 0x02 != 0
    }

    /// A query as a resolver writes it.
    pub fn query(name: &str, kind: u16, size: Option<u16>) -> Vec<u8> {
        let mut message = vec![
            0xAB,
            0xCD,
            0x01,
            0,
            0,
            1,
            0,
            0,
            0,
            0,
            0,
            u8::from(size.is_some()),
        ];
        for label in name.split('.').filter(|label| !label.is_empty()) {
            message.push(label.len() as u8);
            message.extend(label.as_bytes());
        }
        message.push(0);
        message.extend(kind.to_be_bytes());
        message.extend([0, 1]);
        if let Some(size) = size {
            message.extend([0, 0, 41]);
            message.extend(size.to_be_bytes());
            message.extend([0; 6]);
        }
        message
    }

    #[test]
    fn a_query_is_read() {
        let read = Query::parse(&query("Cart.Shop", A, None)).unwrap();
        assert_eq!(
            (read.id, read.name.as_str(), read.kind),
            (0xABCD, "cart.shop", A)
        );
        assert_eq!(read.datagram, 512);
        assert_eq!(
            Query::parse(&query("a", AAAA, Some(4096)))
                .unwrap()
                .datagram,
            1232
        );
        assert_eq!(Query::parse(&query("", A, None)).unwrap().name, "");
    }

    #[test]
    fn what_is_no_simple_query_is_left_alone() {
        let good = query("cart.shop", A, None);
        for end in 0..good.len() {
            assert_eq!(Query::parse(&good[..end]), None, "{end}");
        }
        let with = |at: usize, byte: u8| {
            let mut message = good.clone();
            message[at] = byte;
            Query::parse(&message)
        };
        assert_eq!(with(2, 0x81), None, "a response");
        assert_eq!(with(2, 0x29), None, "another operation");
        assert_eq!(with(5, 2), None, "two questions");
        assert_eq!(with(12, 0xC0), None, "a pointer");
        assert_eq!(with(good.len() - 1, 3), None, "another class");
        assert_eq!(
            Query::parse(&query(&"a".repeat(60).repeat(5), A, None)),
            None
        );
    }

    #[test]
    fn an_answer_is_laid_out_as_specified() {
        let read = Query::parse(&query("a.b", A, None)).unwrap();
        let addresses = ["10.0.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let answer = read.answer(Code::Success, &addresses, 30, 512);
        let expected = [
            &[0xAB, 0xCD, 0x85, 0x80, 0, 1, 0, 1, 0, 0, 0, 0][..],
            &[1, b'a', 1, b'b', 0, 0, 1, 0, 1],
            &[0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 10, 0, 0, 1],
        ]
        .concat();
        assert_eq!(answer, expected);
    }

    #[test]
    fn an_answer_that_does_not_fit_says_so() {
        let read = Query::parse(&query("a.b", AAAA, Some(600))).unwrap();
        let many: Vec<IpAddr> = (0..100u128).map(|n| IpAddr::V6(n.into())).collect();
        let cut = read.answer(Code::Success, &many, 30, read.datagram);
        assert!(cut.len() <= 600 && truncated(&cut));
        let whole = read.answer(Code::Success, &many, 30, usize::from(u16::MAX));
        assert!(!truncated(&whole));
        assert_eq!(u16::from_be_bytes([whole[6], whole[7]]), 100);
        let short = shortened(&whole, 512);
        assert!(truncated(&short));
        assert_eq!(short.len(), 12 + 5 + 4);
        assert_eq!(short[6..12], [0; 6]);
    }
}
