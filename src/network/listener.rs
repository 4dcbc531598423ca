//! Sockets that wait for connections.

use std::io;
use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpSocket, lookup_host};

/// How many connections may wait in the kernel until they are accepted. Tokio's own 128 are fewer than the
/// clients that open a connection at the same moment when a leader changes or a program starts; Linux drops
/// what comes beyond, and the client tries again only a second later. The kernel takes less if it is
/// configured so (`net.core.somaxconn`, 4096 since Linux 5.4).
const BACKLOG: u32 = 4096;

/// Listens at the first of the addresses that `address`, `HOST:PORT`, stands for.
///
/// # Errors
/// It stands for none, or none can be listened at: why not the last one.
pub async fn listen(address: &str) -> io::Result<TcpListener> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in lookup_host(address).await? {
        match listen_at(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

fn listen_at(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // A node that is started again need not wait until the kernel has forgotten its old connections.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::future::try_join_all;
    use tokio::net::TcpStream;

    use super::*;

    /// Four times what fits into a queue of the usual length.
    const BURST: usize = 500;

    #[tokio::test]
    async fn a_burst_of_clients_waits_to_be_accepted() {
        let listener = listen("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let kernel_max = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
        let burst = BURST.min(kernel_max.trim().parse().unwrap());
        // Nobody accepts: what does not fit into the queue never connects.
        let connected = try_join_all((0..burst).map(|_| TcpStream::connect(address)));
        let connected = tokio::time::timeout(Duration::from_secs(20), connected).await;
        assert_eq!(connected.expect("the queue is too short").unwrap().len(), burst);
    }

    #[tokio::test]
    async fn an_address_in_use_is_refused_and_one_that_is_free_again_is_not() {
        let listener = listen("localhost:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let refused = listen(&address.to_string()).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
        let client = TcpStream::connect(address).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        // Who closes first leaves the address behind for a minute.
        drop((server, listener));
        drop(client);
        listen(&address.to_string()).await.unwrap();
    }
}
