//! Who a workload is, and the certificates that prove it. A node proxy holds one certificate for
//! each service account that runs on its node and speaks for a pod only with that pod's own.

pub mod authority;
pub mod certificate;
mod local_root;
pub mod store;

use std::{fmt, str::FromStr, sync::Arc};

use thiserror::Error;

/// A SPIFFE identity as Istio forms it: `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    pub trust_domain: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
}

/// A URI that is not an identity of this form.
#[derive(Debug, Error)]
#[error("{0:?} is not spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT")]
pub struct NotAnIdentity(String);

impl Identity {
    pub fn new(
        trust_domain: impl Into<Arc<str>>,
        namespace: impl Into<Arc<str>>,
        service_account: impl Into<Arc<str>>,
    ) -> Self {
        Self {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        }
    }

    /// The identity without its scheme, as policies write principals.
    pub fn principal(&self) -> String {
        format!(
            "{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

impl FromStr for Identity {
    type Err = NotAnIdentity;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        let parts: Vec<&str> = uri
            .strip_prefix("spiffe://")
            .map(|rest| rest.split('/').collect())
            .unwrap_or_default();
        match parts[..] {
            [domain, "ns", namespace, "sa", account]
                if !domain.is_empty() && !namespace.is_empty() && !account.is_empty() =>
            {
                Ok(Self::new(domain, namespace, account))
            }
            _ => Err(NotAnIdentity(uri.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_survives_the_round_trip() {
        let uri = "spiffe://cluster.local/ns/shop/sa/cart";
        let identity: Identity = uri.parse().unwrap();
        assert_eq!(identity.to_string(), uri);
        assert_eq!(identity.principal(), "cluster.local/ns/shop/sa/cart");
    }

    #[test]
    fn other_uris_are_refused() {
        for uri in [
            "https://cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/a",
            "spiffe:///ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/b/extra",
            "spiffe://cluster.local/ns//sa/b",
        ] {
            assert!(uri.parse::<Identity>().is_err(), "{uri}");
        }
    }
}
