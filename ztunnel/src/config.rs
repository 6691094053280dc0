//! What the proxy is told from outside: environment variables, named as Istio's ztunnel names
//! them so that either can take the other's place in a DaemonSet. Read once at start; nothing else
//! in the program looks at the environment.

use std::{path::PathBuf, time::Duration};

use thiserror::Error;

use crate::telemetry::access_log::LogFormat;

/// The mark of every socket of the proxy; the pod's redirection rules let it through.
pub const PACKET_MARK: u32 = 0x539;
/// Ports the proxy opens in every pod: captured connections out, plaintext in, HBONE in, DNS.
pub const OUTBOUND_PORT: u16 = 15001;
pub const INBOUND_PLAINTEXT_PORT: u16 = 15006;
pub const INBOUND_HBONE_PORT: u16 = 15008;
pub const DNS_PORT: u16 = 15053;
/// Ports of the proxy's own pod.
pub const ADMIN_PORT: u16 = 15000;
pub const METRICS_PORT: u16 = 15020;
pub const READINESS_PORT: u16 = 15021;

/// A setting that cannot be used, with what was found.
#[derive(Debug, Error)]
#[error("environment variable {name}: {reason} (found {found:?})")]
pub struct ConfigError {
    name: &'static str,
    found: String,
    reason: &'static str,
}

/// Where certificates come from.
#[derive(Debug, Clone)]
pub enum CaSource {
    /// istiod's certificate service at this URL, trusted through this PEM file.
    Remote { address: String, root: PathBuf },
    /// Certificates signed in this process with `ca.crt` and `ca.key` of this directory.
    Local { directory: PathBuf },
}

/// Where workloads, services and policies come from.
#[derive(Debug, Clone)]
pub enum XdsSource {
    /// istiod's discovery service at this URL, trusted through this PEM file.
    Remote { address: String, root: PathBuf },
    /// A JSON file, read again when it changes.
    File(PathBuf),
}

/// The node agent's and DNS's part in the proxy's life.
#[derive(Debug, Clone)]
pub struct Config {
    pub xds: XdsSource,
    pub ca: CaSource,
    /// The node agent's socket; without it no pod is ever served.
    pub inpod_uds: PathBuf,
    /// The service-account token shown to istiod, read at every use because it is rotated.
    pub token: PathBuf,
    pub node_name: String,
    pub pod_name: String,
    pub pod_namespace: String,
    pub instance_ip: String,
    pub cluster_id: String,
    pub cluster_domain: String,
    pub trust_domain: String,
    /// Other trust domains whose identities count as ours.
    pub trust_domain_aliases: Vec<String>,
    /// Take clients of any trust domain that our roots vouch for.
    pub any_trust_domain: bool,
    pub network: String,
    /// Lifetime asked for when a certificate is requested.
    pub certificate_ttl: Duration,
    pub worker_threads: usize,
    /// Streams of one pooled connection before another is opened.
    pub pool_max_streams: usize,
    /// How long a pooled connection without streams is kept.
    pub pool_idle: Duration,
    /// How long open connections may go on after SIGTERM.
    pub termination_grace: Duration,
    /// Keep the client's address as the source of connections to the application.
    pub original_source: bool,
    /// Answer the pods' DNS queries for names of the mesh.
    pub dns_capture: bool,
    pub dns_upstream: Option<String>,
    /// Where flow records go, `http://HOST:PORT`; nowhere if unset.
    pub flow_collector: Option<String>,
    pub log_format: LogFormat,
    /// Levels of the program's own log.
    pub log_levels: String,
    /// Address the admin, metrics and readiness ports are opened on is fixed by the port's role;
    /// these allow several proxies in one network namespace.
    pub admin_port: u16,
    pub metrics_port: u16,
    pub readiness_port: u16,
}

impl Config {
    /// Reads the process's environment.
    pub fn from_environment() -> Result<Self, ConfigError> {
        Self::from_lookup(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// Whether a client of this trust domain is one of ours.
    pub fn trusts(&self, trust_domain: &str) -> bool {
        self.any_trust_domain
            || self.trust_domain == trust_domain
            || self
                .trust_domain_aliases
                .iter()
                .any(|alias| alias == trust_domain)
    }

    /// Builds the configuration from any source of variables; absent ones take Istio's defaults.
    pub fn from_lookup(
        lookup: impl Fn(&'static str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        let text = |name, default: &str| lookup(name).unwrap_or_else(|| default.to_owned());
        let path = |name, default: &str| PathBuf::from(text(name, default));
        let number = |name: &'static str, default: usize| match lookup(name) {
            None => Ok(default),
            Some(found) => found.parse().map_err(|_| ConfigError {
                name,
                found,
                reason: "not a whole number",
            }),
        };
        let port = |name: &'static str, default: u16| match lookup(name) {
            None => Ok(default),
            Some(found) => found.parse().map_err(|_| ConfigError {
                name,
                found,
                reason: "not a port number",
            }),
        };
        let duration = |name: &'static str, default: Duration| match lookup(name) {
            None => Ok(default),
            Some(found) => parse_duration(&found).ok_or(ConfigError {
                name,
                found,
                reason: "not a duration such as 90s, 5m, 24h or a number of seconds",
            }),
        };
        let flag = |name: &'static str, default: bool| match lookup(name).as_deref() {
            None => Ok(default),
            Some("true" | "1" | "yes" | "on") => Ok(true),
            Some("false" | "0" | "no" | "off") => Ok(false),
            Some(found) => Err(ConfigError {
                name,
                found: found.to_owned(),
                reason: "neither true nor false",
            }),
        };

        const ISTIOD: &str = "https://istiod.istio-system.svc:15012";
        const ROOT: &str = "/var/run/secrets/istio/root-cert.pem";
        let xds = match lookup("LOCAL_XDS_PATH") {
            Some(file) => XdsSource::File(file.into()),
            None => XdsSource::Remote {
                address: text("XDS_ADDRESS", ISTIOD),
                root: path("XDS_ROOT_CA", ROOT),
            },
        };
        let ca = if flag("FAKE_CA", false)? {
            CaSource::Local {
                directory: path("FAKE_CA_ROOT", "."),
            }
        } else {
            CaSource::Remote {
                address: text("CA_ADDRESS", ISTIOD),
                root: path("CA_ROOT_CA", ROOT),
            }
        };
        Ok(Self {
            xds,
            ca,
            inpod_uds: path("INPOD_UDS", "/var/run/ztunnel/ztunnel.sock"),
            token: path("AUTH_TOKEN", "/var/run/secrets/tokens/istio-token"),
            node_name: text("NODE_NAME", ""),
            pod_name: text("POD_NAME", ""),
            pod_namespace: text("POD_NAMESPACE", ""),
            instance_ip: text("INSTANCE_IP", "127.0.0.1"),
            cluster_id: text("CLUSTER_ID", "Kubernetes"),
            cluster_domain: text("CLUSTER_DOMAIN", "cluster.local"),
            trust_domain: text("TRUST_DOMAIN", "cluster.local"),
            trust_domain_aliases: text("TRUST_DOMAIN_ALIASES", "")
                .split(',')
                .map(str::trim)
                .filter(|domain| !domain.is_empty())
                .map(str::to_owned)
                .collect(),
            any_trust_domain: flag("SKIP_VALIDATE_TRUST_DOMAIN", false)?,
            network: text("NETWORK", ""),
            certificate_ttl: duration("SECRET_TTL", Duration::from_secs(24 * 3600))?,
            worker_threads: number("ZTUNNEL_WORKER_THREADS", 2)?.max(1),
            pool_max_streams: number("POOL_MAX_STREAMS_PER_CONNECTION", 100)?.max(1),
            pool_idle: duration("POOL_UNUSED_RELEASE_TIMEOUT", Duration::from_secs(300))?,
            termination_grace: duration(
                "TERMINATION_GRACE_PERIOD_SECONDS",
                Duration::from_secs(5),
            )?,
            original_source: flag("ENABLE_ORIG_SRC", true)?,
            dns_capture: flag("ISTIO_META_DNS_CAPTURE", true)?,
            dns_upstream: lookup("DNS_UPSTREAM"),
            flow_collector: lookup("FLOW_COLLECTOR"),
            log_format: match lookup("LOG_FORMAT").as_deref() {
                Some("json") => LogFormat::Json,
                None | Some("plain" | "text") => LogFormat::Text,
                Some(found) => {
                    return Err(ConfigError {
                        name: "LOG_FORMAT",
                        found: found.to_owned(),
                        reason: "neither json nor plain",
                    })
                }
            },
            log_levels: text("RUST_LOG", "info"),
            admin_port: port("ADMIN_PORT", ADMIN_PORT)?,
            metrics_port: port("METRICS_PORT", METRICS_PORT)?,
            readiness_port: port("READINESS_PORT", READINESS_PORT)?,
        })
    }
}

/// Go-style durations of one unit (`90s`, `5m`, `24h`, `250ms`), or plain seconds.
fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let amount: u64 = digits.parse().ok()?;
    Some(match &text[digits.len()..] {
        "ms" => Duration::from_millis(amount),
        "" | "s" => Duration::from_secs(amount),
        "m" => Duration::from_secs(amount * 60),
        "h" => Duration::from_secs(amount * 3600),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &[(&'static str, &str)]) -> Result<Config, ConfigError> {
        Config::from_lookup(|name| {
            pairs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn defaults_are_istios() {
        let config = with(&[]).unwrap();
        assert_eq!(config.trust_domain, "cluster.local");
        assert_eq!(config.certificate_ttl, Duration::from_secs(86_400));
        assert_eq!(config.termination_grace, Duration::from_secs(5));
        assert!(matches!(config.xds, XdsSource::Remote { .. }));
    }

    #[test]
    fn trust_domains_have_aliases() {
        let config = with(&[("TRUST_DOMAIN_ALIASES", "old.example, older.example")]).unwrap();
        for (domain, trusted) in [
            ("cluster.local", true),
            ("older.example", true),
            ("other.example", false),
            ("", false),
        ] {
            assert_eq!(config.trusts(domain), trusted, "{domain}");
        }
        let config = with(&[("SKIP_VALIDATE_TRUST_DOMAIN", "true")]).unwrap();
        assert!(config.trusts("other.example"));
    }

    #[test]
    fn durations_take_units() {
        for (text, seconds) in [("90s", 90), ("5m", 300), ("24h", 86_400), ("7", 7)] {
            assert_eq!(parse_duration(text), Some(Duration::from_secs(seconds)));
        }
        assert_eq!(parse_duration("1d"), None);
    }

    #[test]
    fn a_wrong_value_names_its_variable() {
        let error = with(&[("ZTUNNEL_WORKER_THREADS", "many")]).unwrap_err();
        assert!(error.to_string().contains("ZTUNNEL_WORKER_THREADS"));
    }
}
