//! Queries passed on to name servers, each from a socket of its own in the pod, with a port by
//! chance, so that nobody can answer in the server's place without having seen the query.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{net::UdpSocket, time::timeout};

use super::{read_message, write_message};
use crate::proxy::sockets::PodSockets;

const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// More comes over TCP alone.
const LARGEST_ANSWER: usize = 16 << 10;

/// Asks one server after the other until one answers.
pub async fn ask(
    sockets: &PodSockets,
    servers: &[SocketAddr],
    message: &[u8],
    over_tcp: bool,
) -> io::Result<Vec<u8>> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "no name server is known");
    for server in servers {
        let asked = async {
            if over_tcp {
                by_connection(sockets, *server, message).await
            } else {
                by_datagram(sockets.datagram(*server)?, message).await
            }
        };
        match timeout(ANSWER_TIMEOUT, asked).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

async fn by_datagram(socket: UdpSocket, message: &[u8]) -> io::Result<Vec<u8>> {
    socket.send(message).await?;
    let mut answer = vec![0; LARGEST_ANSWER];
    loop {
        let length = socket.recv(&mut answer).await?;
        if answers(message, &answer[..length]) {
            answer.truncate(length);
            return Ok(answer);
        }
    }
}

async fn by_connection(
    sockets: &PodSockets,
    server: SocketAddr,
    message: &[u8],
) -> io::Result<Vec<u8>> {
    let mut tcp = sockets.connect(server).await?;
    write_message(&mut tcp, message).await?;
    read_message(&mut tcp).await
}

/// Whether a message is the response to a query: the same number, and a response.
fn answers(query: &[u8], response: &[u8]) -> bool {
    response.len() >= 12 && response.get(..2) == query.get(..2) && response[2] & 0x80 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_response_to_the_query_is_taken() {
        let query = [1, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        let mut response = query;
        assert!(!answers(&query, &response), "an echo");
        response[2] |= 0x80;
        assert!(answers(&query, &response));
        assert!(!answers(&query, &response[..11]));
        response[1] = 9;
        assert!(!answers(&query, &response));
    }
}
