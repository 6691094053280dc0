//! The bookkeeping of delta discovery, without I/O: what to subscribe to, what to tell a server
//! after a reconnect, which answer each response gets. A response is applied as far as it can be
//! understood; what cannot is named in the refusal and the earlier version of it stays.

use std::collections::{BTreeMap, HashMap};

use prost::Message;

use super::convert::{self, Unusable};
use crate::{
    proto::{
        discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status},
        security, workload,
    },
    state::shared::Change,
};

/// gRPC's INVALID_ARGUMENT, the code of a refusal.
const INVALID_ARGUMENT: i32 = 3;
const WILDCARD: &str = "*";

/// The kinds of resources the proxy subscribes to, all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Authorization,
    Address,
}

impl Kind {
    /// Policies first: no connection should be judged before they are there.
    pub const ALL: [Self; 2] = [Self::Authorization, Self::Address];

    pub fn type_url(self) -> &'static str {
        match self {
            Self::Authorization => "type.googleapis.com/istio.security.Authorization",
            Self::Address => "type.googleapis.com/istio.workload.Address",
        }
    }

    fn of(type_url: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.type_url() == type_url)
    }
}

/// What one response leads to.
#[derive(Debug)]
pub struct Outcome {
    pub changes: Vec<Change>,
    pub answer: DeltaDiscoveryRequest,
    /// What of the response could not be used, in words; empty for an acknowledgement.
    pub refused: Vec<String>,
}

/// Everything remembered across connections to the control plane.
#[derive(Debug)]
pub struct Session {
    trust_domain: String,
    versions: BTreeMap<Kind, HashMap<String, String>>,
    answered: BTreeMap<Kind, bool>,
}

impl Session {
    pub fn new(trust_domain: &str) -> Self {
        Self {
            trust_domain: trust_domain.to_owned(),
            versions: Kind::ALL.map(|kind| (kind, HashMap::new())).into(),
            answered: BTreeMap::new(),
        }
    }

    /// The requests that open a connection. After a reconnect they say what is already held, so
    /// that the server sends only the difference, removals included.
    pub fn opening(&self, node: &Node) -> Vec<DeltaDiscoveryRequest> {
        Kind::ALL
            .map(|kind| DeltaDiscoveryRequest {
                node: Some(node.clone()),
                type_url: kind.type_url().to_owned(),
                resource_names_subscribe: vec![WILDCARD.to_owned()],
                initial_resource_versions: self.versions.get(&kind).cloned().unwrap_or_default(),
                ..DeltaDiscoveryRequest::default()
            })
            .into()
    }

    /// Whether every address has been heard of at least once.
    pub fn synchronized(&self) -> bool {
        self.answered.contains_key(&Kind::Address)
    }

    /// Takes a response apart.
    pub fn receive(&mut self, response: DeltaDiscoveryResponse) -> Outcome {
        let mut changes = Vec::with_capacity(response.resources.len());
        let mut refused = Vec::new();
        if let Some(kind) = Kind::of(&response.type_url) {
            self.answered.insert(kind, true);
            let versions = self.versions.entry(kind).or_default();
            for resource in response.resources {
                let (name, version) = (resource.name.clone(), resource.version.clone());
                match change(kind, resource, &self.trust_domain) {
                    Ok(change) => {
                        changes.push(change);
                        versions.insert(name, version);
                    }
                    Err(error) => refused.push(format!("{name}: {error}")),
                }
            }
            for name in response.removed_resources {
                versions.remove(&name);
                changes.push(match kind {
                    Kind::Address => Change::RemoveAddress(name),
                    Kind::Authorization => Change::RemovePolicy(name),
                });
            }
        } else {
            refused.push(format!("type {} was not asked for", response.type_url));
        }
        let answer = DeltaDiscoveryRequest {
            type_url: response.type_url,
            response_nonce: response.nonce,
            error_detail: (!refused.is_empty()).then(|| Status {
                code: INVALID_ARGUMENT,
                message: refused.join("; "),
            }),
            ..DeltaDiscoveryRequest::default()
        };
        Outcome {
            changes,
            answer,
            refused,
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Unreadable {
    #[error("no content")]
    Empty,
    #[error("unreadable: {0}")]
    Encoding(#[from] prost::DecodeError),
    #[error(transparent)]
    Content(#[from] Unusable),
}

fn change(kind: Kind, resource: Resource, trust_domain: &str) -> Result<Change, Unreadable> {
    use workload::address::Type;
    let content = resource.resource.ok_or(Unreadable::Empty)?.value;
    Ok(match kind {
        Kind::Authorization => {
            let message = security::Authorization::decode(&*content)?;
            Change::PutPolicy(Box::new(convert::policy(message)?))
        }
        Kind::Address => match workload::Address::decode(&*content)?.r#type {
            Some(Type::Workload(message)) => {
                Change::PutWorkload(Box::new(convert::workload(message, trust_domain)?))
            }
            Some(Type::Service(message)) => {
                Change::PutService(Box::new(convert::service(message)?))
            }
            None => return Err(Unreadable::Empty),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost_types::Any;

    fn pod(uid: &str, address: &[u8]) -> Resource {
        let message = workload::Address {
            r#type: Some(workload::address::Type::Workload(workload::Workload {
                uid: uid.into(),
                addresses: vec![address.to_vec()],
                ..Default::default()
            })),
        };
        Resource {
            name: uid.into(),
            version: "7".into(),
            resource: Some(Any {
                type_url: Kind::Address.type_url().into(),
                value: message.encode_to_vec(),
            }),
            aliases: vec![],
        }
    }

    fn response(resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
        DeltaDiscoveryResponse {
            type_url: Kind::Address.type_url().into(),
            nonce: "n1".into(),
            resources,
            removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        }
    }

    fn held(session: &Session) -> HashMap<String, String> {
        session.opening(&Node::default())[1]
            .initial_resource_versions
            .clone()
    }

    #[test]
    fn it_opens_with_a_wildcard_for_each_kind() {
        let session = Session::new("cluster.local");
        let requests = session.opening(&Node::default());
        assert_eq!(requests.len(), 2);
        for request in requests {
            assert_eq!(request.resource_names_subscribe, ["*"]);
            assert!(request.initial_resource_versions.is_empty());
            assert!(request.response_nonce.is_empty());
        }
        assert!(!session.synchronized());
    }

    #[test]
    fn an_understood_response_is_acknowledged_and_remembered() {
        let mut session = Session::new("cluster.local");
        let outcome = session.receive(response(vec![pod("a", &[10, 0, 0, 1])], &[]));
        assert_eq!(outcome.answer.response_nonce, "n1");
        assert!(outcome.answer.error_detail.is_none());
        assert!(outcome.answer.resource_names_subscribe.is_empty());
        assert_eq!(outcome.changes.len(), 1);
        assert!(session.synchronized());
        assert_eq!(held(&session), [("a".to_owned(), "7".to_owned())].into());
    }

    #[test]
    fn removed_resources_are_forgotten() {
        let mut session = Session::new("cluster.local");
        session.receive(response(vec![pod("a", &[10, 0, 0, 1])], &[]));
        let outcome = session.receive(response(vec![], &["a"]));
        assert!(matches!(&outcome.changes[..], [Change::RemoveAddress(name)] if name == "a"));
        assert!(held(&session).is_empty());
    }

    #[test]
    fn what_cannot_be_understood_is_refused_by_name_and_the_rest_applied() {
        let mut session = Session::new("cluster.local");
        let outcome = session.receive(response(
            vec![pod("bad", &[1, 2, 3]), pod("good", &[10, 0, 0, 1])],
            &[],
        ));
        assert_eq!(outcome.changes.len(), 1);
        let detail = outcome.answer.error_detail.unwrap();
        assert_eq!(detail.code, INVALID_ARGUMENT);
        assert_eq!(detail.message, "bad: addresses: 3 bytes are no address");
        assert_eq!(held(&session).len(), 1);
    }

    #[test]
    fn an_unknown_type_is_refused() {
        let mut session = Session::new("cluster.local");
        let mut odd = response(vec![], &[]);
        odd.type_url = "type.googleapis.com/other".into();
        assert!(session.receive(odd).answer.error_detail.is_some());
        assert!(!session.synchronized());
    }
}
