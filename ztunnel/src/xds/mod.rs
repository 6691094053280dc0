//! Discovery: how the control plane's word becomes the mesh state.

pub mod client;
pub mod convert;
pub mod file;
pub mod session;
