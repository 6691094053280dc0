//! Load generator and server of the benchmarks. Blocking sockets, one thread a connection, no
//! dependencies, so that what is measured is the path between the two.
//!
//! `load serve PORT`; `load throughput|requests|connects HOST:PORT CONNECTIONS SECONDS` prints one
//! JSON object. A connection's first byte tells the server what follows: `D` = send bytes until the
//! client is gone, `R` = answer each 128-byte request with 128 bytes, `G` = HTTP/1.1 GETs, kept alive
//! (`load http HOST:PORT …`).

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

const MESSAGE: usize = 128;

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut verb = [0u8];
    stream.read_exact(&mut verb)?;
    if verb[0] == b'D' {
        let block = vec![7u8; 256 * 1024];
        loop {
            stream.write_all(&block)?;
        }
    }
    if verb[0] == b'G' {
        let reply = format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {MESSAGE}\r\n\r\n{}",
            "x".repeat(MESSAGE)
        );
        loop {
            head(&mut stream)?;
            stream.write_all(reply.as_bytes())?;
        }
    }
    let mut message = [0u8; MESSAGE];
    loop {
        stream.read_exact(&mut message)?;
        stream.write_all(&message)?;
    }
}

/// Reads to the empty line that ends a message's head; the head, and what came behind it.
fn head(stream: &mut TcpStream) -> std::io::Result<(Vec<u8>, usize)> {
    let mut bytes = Vec::with_capacity(1024);
    let mut block = [0u8; 4096];
    loop {
        let read = stream.read(&mut block)?;
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        bytes.extend_from_slice(&block[..read]);
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            let behind = bytes.len() - at - 4;
            return Ok((bytes, behind));
        }
    }
}

fn http(target: &str, stop: &AtomicBool, tally: &mut Tally) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(target)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        stream.write_all(b"GET /bench HTTP/1.1\r\nhost: server\r\n\r\n")?;
        let (bytes, behind) = head(&mut stream)?;
        if !bytes.starts_with(b"HTTP/1.1 200") {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        let mut rest = vec![0u8; MESSAGE - behind];
        stream.read_exact(&mut rest)?;
        tally.micros.push(start.elapsed().as_micros() as u32);
        tally.count += 1;
    }
    Ok(())
}

fn open(target: &str, verb: u8) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(target)?;
    stream.set_nodelay(true)?;
    stream.write_all(&[verb])?;
    Ok(stream)
}

/// What one connection's thread counted: bytes or completions, failures, latencies in µs.
#[derive(Default)]
struct Tally {
    count: u64,
    failed: u64,
    micros: Vec<u32>,
}

fn work(kind: &str, target: &str, stop: &AtomicBool) -> Tally {
    let mut tally = Tally::default();
    let result = match kind {
        "throughput" => throughput(target, stop, &mut tally),
        "requests" => requests(target, stop, &mut tally),
        "http" => http(target, stop, &mut tally),
        _ => connects(target, stop, &mut tally),
    };
    if result.is_err() {
        tally.failed += 1;
    }
    tally
}

fn throughput(target: &str, stop: &AtomicBool, tally: &mut Tally) -> std::io::Result<()> {
    let mut stream = open(target, b'D')?;
    let mut block = vec![0u8; 256 * 1024];
    while !stop.load(Ordering::Relaxed) {
        tally.count += stream.read(&mut block)? as u64;
    }
    Ok(())
}

fn requests(target: &str, stop: &AtomicBool, tally: &mut Tally) -> std::io::Result<()> {
    let mut stream = open(target, b'R')?;
    let mut message = [1u8; MESSAGE];
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        tally.micros.push(start.elapsed().as_micros() as u32);
        tally.count += 1;
    }
    Ok(())
}

fn connects(target: &str, stop: &AtomicBool, tally: &mut Tally) -> std::io::Result<()> {
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        let once = || -> std::io::Result<()> {
            let mut stream = open(target, b'R')?;
            let mut message = [1u8; MESSAGE];
            stream.write_all(&message)?;
            stream.read_exact(&mut message)
        };
        match once() {
            Ok(()) => {
                tally.count += 1;
                tally.micros.push(start.elapsed().as_micros() as u32);
            }
            Err(_) => tally.failed += 1,
        }
    }
    Ok(())
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments[0] == "serve" {
        let listener =
            TcpListener::bind(("0.0.0.0", arguments[1].parse().expect("port"))).expect("bind");
        for stream in listener.incoming().flatten() {
            thread::spawn(move || answer(stream));
        }
        return;
    }
    let (kind, target) = (arguments[0].clone(), arguments[1].clone());
    let connections: usize = arguments[2].parse().expect("connections");
    let seconds: f64 = arguments[3].parse().expect("seconds");
    let stop = Arc::new(AtomicBool::new(false));
    let start = Instant::now();
    let threads: Vec<_> = (0..connections)
        .map(|_| {
            let (kind, target, stop) = (kind.clone(), target.clone(), stop.clone());
            thread::spawn(move || work(&kind, &target, &stop))
        })
        .collect();
    thread::sleep(Duration::from_secs_f64(seconds));
    stop.store(true, Ordering::Relaxed);
    let tallies: Vec<Tally> = threads
        .into_iter()
        .map(|t| t.join().expect("thread"))
        .collect();
    let elapsed = start.elapsed().as_secs_f64();
    let count: u64 = tallies.iter().map(|t| t.count).sum();
    let failed: u64 = tallies.iter().map(|t| t.failed).sum();
    let mut micros: Vec<u32> = tallies.into_iter().flat_map(|t| t.micros).collect();
    micros.sort_unstable();
    let percentile = |p: f64| {
        micros
            .get((micros.len() as f64 * p) as usize)
            .or(micros.last())
            .copied()
            .unwrap_or(0)
    };
    println!(
        "{{\"count\":{count},\"failed\":{failed},\"seconds\":{elapsed:.3},\"p50_us\":{},\"p99_us\":{}}}",
        percentile(0.5),
        percentile(0.99)
    );
}
