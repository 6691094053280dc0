//! As much of HTTP/1.1 as probes, scrapes and an operator's curl need: one request a connection,
//! no bodies in.

use std::{io, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

const LARGEST_REQUEST: usize = 16 << 10;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// A request's first line.
#[derive(Debug)]
pub struct Request<'a> {
    pub method: &'a str,
    pub path: &'a str,
    query: &'a str,
}

impl<'a> Request<'a> {
    fn parse(head: &'a str) -> Self {
        let mut words = head.split_ascii_whitespace();
        let (method, target) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        Self {
            method,
            path,
            query,
        }
    }

    /// A parameter's text; empty for one without value, `None` if it is not there.
    pub fn query(&self, name: &str) -> Option<&'a str> {
        self.query.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (key == name).then_some(value)
        })
    }
}

/// An answer.
#[derive(Debug)]
pub struct Response {
    pub status: &'static str,
    pub content_type: &'static str,
    pub body: String,
}

impl Response {
    pub fn text(status: &'static str, body: impl Into<String>) -> Self {
        Self {
            status,
            content_type: "text/plain; charset=utf-8",
            body: body.into(),
        }
    }
}

/// Answers requests on `listener` for the life of the process.
pub async fn serve(
    listener: TcpListener,
    handle: impl Fn(&Request<'_>) -> Response + Send + Sync + 'static,
) {
    let handle = Arc::new(handle);
    loop {
        match listener.accept().await {
            Ok((tcp, _)) => {
                let handle = handle.clone();
                tokio::spawn(async move {
                    // A client that goes away early needs no answer.
                    let _ = timeout(REQUEST_TIMEOUT, answer(tcp, &*handle)).await;
                });
            }
            Err(error) => {
                tracing::warn!(error = %error, "no connection accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn answer(mut tcp: TcpStream, handle: &impl Fn(&Request<'_>) -> Response) -> io::Result<()> {
    let mut request = Vec::with_capacity(1024);
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        if request.len() > LARGEST_REQUEST || tcp.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let head = String::from_utf8_lossy(&request);
    let request = Request::parse(&head);
    let response = handle(&request);
    let mut message = format!(
        "HTTP/1.1 {}\r\ncontent-type: {}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        response.status,
        response.content_type,
        response.body.len()
    );
    if request.method != "HEAD" {
        message.push_str(&response.body);
    }
    tcp.write_all(message.as_bytes()).await?;
    tcp.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_query_is_apart_from_the_path() {
        let request = Request::parse("POST /logging?reset&level=debug HTTP/1.1\r\nhost: x\r\n\r\n");
        assert_eq!((request.method, request.path), ("POST", "/logging"));
        assert_eq!(request.query("level"), Some("debug"));
        assert_eq!(request.query("reset"), Some(""));
        assert_eq!(request.query("other"), None);
    }
}
