//! The node proxy. Not built yet: the crate holds its place in the wheel, and says so.

fn main() {
    eprintln!("meshlight-ztunnel: the node proxy is not built yet");
    std::process::exit(1);
}
