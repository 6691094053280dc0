//! Compiles the repository's protobuf files at build time, so that no generated code is committed
//! and no `protoc` is needed.

use std::{env, error::Error, path::PathBuf};

/// The message definitions the proxy speaks, by file name in `proto/`.
const PROTOS: [&str; 5] = [
    "authorization.proto",
    "ca.proto",
    "discovery.proto",
    "workload.proto",
    "zds.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    let crate_dir = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    // A checkout and a source distribution with the same layout have it beside the crate; a
    // source distribution may also carry it inside.
    let candidates = [crate_dir.join("../proto"), crate_dir.join("proto")];
    let dir = candidates
        .iter()
        .find(|dir| dir.join(PROTOS[0]).is_file())
        .ok_or("no proto/ directory beside the crate or in it")?;
    println!("cargo:rerun-if-changed={}", dir.display());
    let descriptors = protox::compile(PROTOS, [dir])?;
    prost_build::Config::new().compile_fds(descriptors)?;
    Ok(())
}
