//! Servers on this machine that are what runs in a VM.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

/// Listens on 127.0.0.1, and serves each client on a thread. Returns the port.
///
/// # Errors
/// There is no port.
pub fn serving(serve: fn(TcpStream)) -> io::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            std::thread::spawn(move || serve(client));
        }
    });
    Ok(port)
}

/// Sends back what comes, and its end, until a client is gone.
pub fn echoes(mut client: TcpStream) {
    let mut piece = vec![0; 64 << 10];
    while let Ok(n) = client.read(&mut piece) {
        if n == 0 {
            let _ = client.shutdown(Shutdown::Write);
            return;
        }
        if client.write_all(&piece[..n]).is_err() {
            return;
        }
    }
}
