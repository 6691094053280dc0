//! As much of gRPC as the proxy needs towards istiod: unary calls and one bidirectional stream,
//! over HTTP/2 with TLS (`https://`) or without (`http://`). Authenticates the server by its DNS
//! name against the mesh's root, itself by the service-account token in the metadata.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::{client, RecvStream, SendStream};
use http::{
    header::{HeaderName, HeaderValue, AUTHORIZATION, CONTENT_TYPE, TE, USER_AGENT},
    HeaderMap, Request, Uri,
};
use prost::Message;
use rustls::{pki_types::ServerName, ClientConfig};
use thiserror::Error;
use tokio::{net::TcpStream, task::AbortHandle, time::timeout};
use tokio_rustls::TlsConnector;

use crate::identity::certificate::{crypto_provider, root_store};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// The largest message taken; a full push of a large mesh is some tens of MiB.
const MAX_MESSAGE: usize = 256 << 20;
const WINDOW: u32 = 4 << 20;

/// Why a call failed.
#[derive(Debug, Error)]
pub enum GrpcError {
    #[error("address {address:?}: {reason}")]
    Address { address: String, reason: String },
    #[error("reading {path}: {error}")]
    File { path: PathBuf, error: io::Error },
    #[error("root certificates in {path}: {reason}")]
    Roots { path: PathBuf, reason: String },
    /// The name is not known, or nobody takes connections there.
    #[error("connecting to {address}: {error}")]
    Absent { address: String, error: io::Error },
    #[error("connecting to {address}: {error}")]
    Connect { address: String, error: io::Error },
    #[error("metadata {name}: not allowed in a header")]
    Metadata { name: String },
    #[error("HTTP/2: {0}")]
    Http2(#[from] h2::Error),
    #[error("HTTP status {0}")]
    HttpStatus(http::StatusCode),
    #[error("gRPC status {code}: {message}")]
    Status { code: i32, message: String },
    #[error("message: {0}")]
    Message(String),
}

/// A server to call, by URL.
#[derive(Debug, Clone)]
pub struct Endpoint {
    authority: String,
    host: String,
    port: u16,
    /// Trusted roots, read at every connection because they are rotated; `None` without TLS.
    root: Option<PathBuf>,
}

impl Endpoint {
    /// `address` is `https://HOST:PORT` or `http://HOST:PORT`; `root` is used for the former.
    pub fn new(address: &str, root: &Path) -> Result<Self, GrpcError> {
        let wrong = |reason: &str| GrpcError::Address {
            address: address.to_owned(),
            reason: reason.to_owned(),
        };
        let uri: Uri = address
            .parse()
            .map_err(|_| wrong("not a URL such as https://host:15012"))?;
        let root = match uri.scheme_str() {
            Some("https") => Some(root.to_owned()),
            Some("http") => None,
            _ => return Err(wrong("the scheme must be https or http")),
        };
        let host = uri.host().ok_or_else(|| wrong("no host"))?;
        let host = host.trim_matches(['[', ']']).to_owned();
        let port = uri
            .port_u16()
            .unwrap_or(if root.is_some() { 443 } else { 80 });
        let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
        Ok(Self {
            authority,
            host,
            port,
            root,
        })
    }

    /// Opens a connection; it ends when the channel and its streams are dropped.
    pub async fn connect(&self) -> Result<Channel, GrpcError> {
        let failed = |error: io::Error| GrpcError::Connect {
            address: self.authority.clone(),
            error,
        };
        let connecting = async {
            let tcp = TcpStream::connect((self.host.as_str(), self.port))
                .await
                .map_err(|error| GrpcError::Absent {
                    address: self.authority.clone(),
                    error,
                })?;
            tcp.set_nodelay(true).map_err(failed)?;
            match &self.root {
                None => self.handshake(tcp).await,
                Some(root) => {
                    let name = ServerName::try_from(self.host.clone())
                        .map_err(|error| failed(io::Error::other(error)))?;
                    let tls = TlsConnector::from(Arc::new(tls_config(root)?))
                        .connect(name, tcp)
                        .await
                        .map_err(failed)?;
                    self.handshake(tls).await
                }
            }
        };
        timeout(CONNECT_TIMEOUT, connecting)
            .await
            .map_err(|_| failed(io::ErrorKind::TimedOut.into()))?
    }

    async fn handshake<T>(&self, io: T) -> Result<Channel, GrpcError>
    where
        T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, mut connection) = client::Builder::new()
            .initial_window_size(WINDOW)
            .initial_connection_window_size(WINDOW * 2)
            .max_frame_size(1 << 20)
            .enable_push(false)
            .handshake(io)
            .await?;
        let pings = connection.ping_pong();
        let driver = tokio::spawn(async move {
            tokio::select! {
                result = connection => if let Err(error) = result {
                    tracing::debug!(error = %error, "connection to istiod ended");
                },
                () = keep_alive(pings) => tracing::warn!("connection to istiod is silent, closing it"),
            }
        })
        .abort_handle();
        let tls = self.root.is_some();
        Ok(Channel {
            sender,
            base: format!(
                "{}://{}",
                if tls { "https" } else { "http" },
                self.authority
            ),
            driver: Driver(driver),
        })
    }
}

/// Returns when the peer has not answered a ping in time.
async fn keep_alive(pings: Option<h2::PingPong>) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(PING_INTERVAL).await;
        match timeout(PING_TIMEOUT, pings.ping(h2::Ping::opaque())).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

fn tls_config(root: &Path) -> Result<ClientConfig, GrpcError> {
    let pem = fs::read(root).map_err(|error| GrpcError::File {
        path: root.to_owned(),
        error,
    })?;
    let wrong = |reason: String| GrpcError::Roots {
        path: root.to_owned(),
        reason,
    };
    let roots = root_store(&pem).map_err(|error| wrong(error.to_string()))?;
    let mut config = ClientConfig::builder_with_provider(crypto_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| wrong(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Headers of a call.
#[derive(Debug, Clone, Default)]
pub struct Metadata(HeaderMap);

impl Metadata {
    /// `authorization: Bearer TOKEN` with the token in `path`; without a file, none.
    pub fn with_token(path: &Path) -> Result<Self, GrpcError> {
        let token = match fs::read_to_string(path) {
            Ok(token) => token,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => {
                return Err(GrpcError::File {
                    path: path.to_owned(),
                    error,
                })
            }
        };
        Self::default().and(AUTHORIZATION.as_str(), &format!("Bearer {}", token.trim()))
    }

    /// Adds one entry.
    pub fn and(mut self, name: &str, value: &str) -> Result<Self, GrpcError> {
        let wrong = || GrpcError::Metadata {
            name: name.to_owned(),
        };
        let header: HeaderName = name.parse().map_err(|_| wrong())?;
        let mut value = HeaderValue::from_str(value).map_err(|_| wrong())?;
        value.set_sensitive(header == AUTHORIZATION);
        self.0.insert(header, value);
        Ok(self)
    }
}

struct Driver(AbortHandle);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// An open connection to a server.
pub struct Channel {
    sender: client::SendRequest<Bytes>,
    base: String,
    driver: Driver,
}

impl Channel {
    /// One request, one response.
    pub async fn unary<Req: Message, Resp: Message + Default>(
        self,
        path: &str,
        metadata: &Metadata,
        request: &Req,
    ) -> Result<Resp, GrpcError> {
        let (mut requests, responses) = self.open(path, metadata).await?;
        requests.send(request)?;
        requests.finish()?;
        let mut responses = responses.await_headers().await?;
        let response = responses.message().await?.ok_or_else(|| {
            GrpcError::Message("the call succeeded without a response".to_owned())
        })?;
        Ok(response)
    }

    /// Opens a stream of requests and responses.
    pub async fn open(
        mut self,
        path: &str,
        metadata: &Metadata,
    ) -> Result<(Requests, ResponsesToCome), GrpcError> {
        let mut request = Request::post(format!("{}{path}", self.base))
            .version(http::Version::HTTP_2)
            .body(())
            .map_err(|error| GrpcError::Message(error.to_string()))?;
        let headers = request.headers_mut();
        headers.extend(metadata.0.clone());
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.insert(
            USER_AGENT,
            HeaderValue::from_static(concat!("meshlight-ztunnel/", env!("CARGO_PKG_VERSION"))),
        );
        self.sender = self.sender.ready().await?;
        let (response, stream) = self.sender.send_request(request, false)?;
        Ok((
            Requests { stream },
            ResponsesToCome {
                response,
                driver: self.driver,
            },
        ))
    }
}

/// The sending half of a call.
pub struct Requests {
    stream: SendStream<Bytes>,
}

impl Requests {
    /// Sends one message.
    pub fn send<T: Message>(&mut self, message: &T) -> Result<(), GrpcError> {
        Ok(self.stream.send_data(encode(message), false)?)
    }

    /// Says that no more messages follow.
    pub fn finish(&mut self) -> Result<(), GrpcError> {
        Ok(self.stream.send_data(Bytes::new(), true)?)
    }
}

/// The receiving half of a call before the server's headers.
pub struct ResponsesToCome {
    response: client::ResponseFuture,
    driver: Driver,
}

impl ResponsesToCome {
    /// Waits for the server's headers.
    pub async fn await_headers(self) -> Result<Responses, GrpcError> {
        let (head, stream) = self.response.await?.into_parts();
        if !head.status.is_success() {
            return Err(GrpcError::HttpStatus(head.status));
        }
        check_status(&head.headers)?;
        Ok(Responses {
            stream,
            pending: BytesMut::new(),
            _driver: self.driver,
        })
    }
}

/// The receiving half of a call.
pub struct Responses {
    stream: RecvStream,
    pending: BytesMut,
    _driver: Driver,
}

impl Responses {
    /// The next message; `None` when the server ended the call successfully.
    pub async fn message<T: Message + Default>(&mut self) -> Result<Option<T>, GrpcError> {
        loop {
            if let Some(message) = take_message(&mut self.pending)? {
                return T::decode(message)
                    .map(Some)
                    .map_err(|error| GrpcError::Message(error.to_string()));
            }
            match self.stream.data().await {
                Some(chunk) => {
                    let chunk = chunk?;
                    self.stream.flow_control().release_capacity(chunk.len())?;
                    self.pending.extend_from_slice(&chunk);
                }
                None => {
                    if let Some(trailers) = self.stream.trailers().await? {
                        check_status(&trailers)?;
                    }
                    return Ok(None);
                }
            }
        }
    }
}

/// Five bytes of prefix (no compression, length), then the message.
fn encode<T: Message>(message: &T) -> Bytes {
    let length = message.encoded_len();
    let mut frame = BytesMut::with_capacity(5 + length);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    frame.extend_from_slice(&message.encode_to_vec());
    frame.freeze()
}

fn take_message(pending: &mut BytesMut) -> Result<Option<Bytes>, GrpcError> {
    if pending.len() < 5 {
        return Ok(None);
    }
    if pending[0] != 0 {
        return Err(GrpcError::Message(
            "compressed, though no compression was offered".to_owned(),
        ));
    }
    let length = u32::from_be_bytes([pending[1], pending[2], pending[3], pending[4]]) as usize;
    if length > MAX_MESSAGE {
        return Err(GrpcError::Message(format!(
            "{length} bytes are more than the {MAX_MESSAGE} allowed"
        )));
    }
    if pending.len() < 5 + length {
        return Ok(None);
    }
    pending.advance(5);
    Ok(Some(pending.split_to(length).freeze()))
}

fn check_status(headers: &HeaderMap) -> Result<(), GrpcError> {
    let Some(status) = headers.get("grpc-status") else {
        return Ok(());
    };
    match status.to_str().ok().and_then(|text| text.parse().ok()) {
        Some(0) => Ok(()),
        code => Err(GrpcError::Status {
            code: code.unwrap_or(2),
            message: headers
                .get("grpc-message")
                .map(|text| String::from_utf8_lossy(text.as_bytes()).into_owned())
                .unwrap_or_default(),
        }),
    }
}

/// Takes messages from a stream until there is none or it is none.
#[cfg(test)]
pub fn take_all(stream: &[u8]) {
    let mut pending = BytesMut::from(stream);
    while let Ok(Some(_)) = take_message(&mut pending) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_cut_from_the_stream_wherever_it_breaks() {
        let frame = encode(&"hello".to_owned());
        let mut pending = BytesMut::new();
        for byte in &frame[..frame.len() - 1] {
            pending.put_u8(*byte);
            assert!(take_message(&mut pending).unwrap().is_none());
        }
        pending.put_u8(frame[frame.len() - 1]);
        pending.extend_from_slice(&frame);
        let first = take_message(&mut pending).unwrap().unwrap();
        assert_eq!(String::decode(first).unwrap(), "hello");
        assert_eq!(pending.len(), frame.len());
    }

    #[test]
    fn a_status_other_than_zero_is_an_error() {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("16"));
        trailers.insert("grpc-message", HeaderValue::from_static("no token"));
        let error = check_status(&trailers).unwrap_err();
        assert_eq!(error.to_string(), "gRPC status 16: no token");
    }

    #[test]
    fn addresses_need_a_scheme() {
        let root = Path::new("root.pem");
        assert!(Endpoint::new("istiod:15012", root).is_err());
        assert!(Endpoint::new("https://istiod.istio-system.svc:15012", root).is_ok());
    }
}
