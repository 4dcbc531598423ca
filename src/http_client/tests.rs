//! The client says truly whether a request may have arrived, and repeats none that may have: against servers
//! that do what they are told, byte by byte.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Runtime;

use super::*;

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const PATIENCE: Duration = Duration::from_secs(20);

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

fn request_to(address: &str, body: &[u8]) -> HttpRequest {
    HttpRequest {
        method: Method::PUT,
        address: address.to_owned(),
        path_and_query: "/v1/kv/..%2F?x=1".to_owned(),
        headers: HeaderMap::new(),
        body: Bytes::copy_from_slice(body),
    }
}

async fn send(client: &HttpClient, address: &str) -> Result<HttpResponse, SendError> {
    client.send(request_to(address, b"body"), Instant::now() + PATIENCE).await
}

/// Reads a request with the body `body`; empty when the connection was closed.
async fn receive(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n\r\nbody") {
        let read = tokio::time::timeout(PATIENCE, stream.read_buf(&mut text)).await;
        if read.expect("nothing came").unwrap_or(0) == 0 {
            break;
        }
    }
    String::from_utf8(text).unwrap()
}

async fn accept(listener: &TcpListener) -> TcpStream {
    tokio::time::timeout(PATIENCE, listener.accept()).await.unwrap().unwrap().0
}

/// Answers whatever comes, on all connections.
async fn serve(listener: TcpListener) {
    loop {
        let mut stream = accept(&listener).await;
        tokio::spawn(async move {
            while !receive(&mut stream).await.is_empty() {
                if stream.write_all(OK).await.is_err() {
                    return;
                }
            }
        });
    }
}

#[tokio::test]
async fn requests_follow_each_other_on_one_connection_as_they_were_given() {
    let (listener, address) = listen().await;
    let client = HttpClient::new();
    let server = async {
        let mut stream = accept(&listener).await;
        for _ in 0..3 {
            let text = receive(&mut stream).await;
            assert!(text.starts_with("PUT /v1/kv/..%2F?x=1 HTTP/1.1\r\n"), "{text}");
            assert!(text.contains(&format!("host: {address}\r\n")), "{text}");
            stream.write_all(OK).await.unwrap();
        }
    };
    let sender = async {
        for _ in 0..3 {
            let response = send(&client, &address).await.unwrap();
            assert_eq!((response.status, &response.body[..]), (StatusCode::OK, &b"ok"[..]));
        }
    };
    tokio::join!(server, sender);
}

/// Once the runtime has heard of the end. A request that is sent before that may be lost, and says so.
#[tokio::test]
async fn a_connection_that_was_closed_while_idle_is_replaced() {
    let (listener, address) = listen().await;
    let client = HttpClient::new();
    for _ in 0..3 {
        let server = async {
            let mut stream = accept(&listener).await;
            assert!(!receive(&mut stream).await.is_empty());
            stream.write_all(OK).await.unwrap();
        };
        let (_, response) = tokio::join!(server, send(&client, &address));
        response.unwrap();
        // For the runtime to hear of it, as it does while other things go on.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn an_answer_that_says_so_ends_its_connection() {
    let (listener, address) = listen().await;
    let client = HttpClient::new();
    let last = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    for _ in 0..2 {
        let server = async {
            let mut stream = accept(&listener).await;
            receive(&mut stream).await;
            stream.write_all(last).await.unwrap();
            assert_eq!(receive(&mut stream).await, "", "it is the client that closes");
        };
        let (_, response) = tokio::join!(server, send(&client, &address));
        response.unwrap();
    }
}

#[tokio::test]
async fn what_may_have_arrived_is_not_sent_again() {
    let (listener, address) = listen().await;
    let client = HttpClient::new();
    // On a connection of its own, then on one that was used before.
    let server = async {
        let mut stream = accept(&listener).await;
        assert!(!receive(&mut stream).await.is_empty());
        drop(stream);
        let mut stream = accept(&listener).await;
        assert!(!receive(&mut stream).await.is_empty());
        stream.write_all(OK).await.unwrap();
        assert!(!receive(&mut stream).await.is_empty());
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf").await.unwrap();
    };
    let sender = async {
        let lost = send(&client, &address).await.unwrap_err();
        assert!(matches!(lost, SendError::MaybeSent { .. }), "{lost:?}");
        send(&client, &address).await.unwrap();
        let lost = send(&client, &address).await.unwrap_err();
        assert!(matches!(lost, SendError::MaybeSent { .. }), "{lost:?}");
    };
    tokio::join!(server, sender);
    assert!(tokio::time::timeout(Duration::from_millis(50), listener.accept()).await.is_err());
}

#[tokio::test]
async fn a_refused_connection_and_a_senseless_address_say_that_nothing_was_sent() {
    // Its port is bound, and nobody listens there.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap().to_string();
    let client = HttpClient::new();
    for address in [&address[..], "no port", "", "a:1\r\nx:y"] {
        let error = send(&client, address).await.unwrap_err();
        assert!(matches!(error, SendError::NotSent { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn who_waits_no_longer_closes_the_connection() {
    let (listener, address) = listen().await;
    let client = HttpClient::new();
    let deadline = Instant::now() + Duration::from_millis(300);
    let (mut stream, error) =
        tokio::join!(accept(&listener), client.send(request_to(&address, b"body"), deadline));
    assert!(matches!(error.unwrap_err(), SendError::TimedOut { .. }));
    assert!(!receive(&mut stream).await.is_empty());
    assert_eq!(receive(&mut stream).await, "", "the deadline closes it");

    let mut sending = Box::pin(send(&client, &address));
    let arrived = async {
        let mut stream = accept(&listener).await;
        assert!(!receive(&mut stream).await.is_empty());
        stream
    };
    let mut stream = tokio::select! {
        stream = arrived => stream,
        result = &mut sending => panic!("{result:?}"),
    };
    drop(sending);
    assert_eq!(receive(&mut stream).await, "", "its caller has gone");
}

#[tokio::test]
async fn bodies_larger_than_any_buffer_pass_in_both_directions() {
    const BYTES: usize = 5 << 20;
    let (listener, address) = listen().await;
    let client = HttpClient::new();
    let server = async {
        let mut stream = accept(&listener).await;
        for _ in 0..2 {
            let mut received = Vec::new();
            while received.len() < BYTES || !received.ends_with(b"\x07end") {
                assert!(stream.read_buf(&mut received).await.unwrap() > 0);
            }
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {BYTES}\r\n\r\n");
            stream.write_all(head.as_bytes()).await.unwrap();
            stream.write_all(&received[received.len() - BYTES..]).await.unwrap();
        }
    };
    let mut body = vec![7; BYTES - 3];
    body.extend_from_slice(b"end");
    let sender = async {
        for _ in 0..2 {
            let sending = client.send(request_to(&address, &body), Instant::now() + PATIENCE);
            assert!(sending.await.unwrap().body == body);
        }
    };
    tokio::join!(server, sender);
}

/// It must neither hang nor be taken for a lost request: the answer is there.
#[tokio::test]
async fn an_answer_before_all_of_the_request_is_an_answer() {
    let (listener, address) = listen().await;
    let client = HttpClient::new();
    let body = vec![0; 8 << 20];
    let refusal = b"HTTP/1.1 413 Payload Too Large\r\ncontent-length: 0\r\n\r\n";
    let server = async {
        let mut stream = accept(&listener).await;
        let mut start = [0; 1000];
        stream.read_exact(&mut start).await.unwrap();
        stream.write_all(refusal).await.unwrap();
        stream
    };
    let sending = client.send(request_to(&address, &body), Instant::now() + PATIENCE);
    let (_stream, response) = tokio::join!(server, sending);
    assert_eq!(response.unwrap().status, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn an_idle_connection_is_closed_in_the_end() {
    let (listener, address) = listen().await;
    let mut client = HttpClient::new();
    client.pool = Arc::new(Pool::new(Duration::from_millis(50), usize::MAX));
    // Twice, because who closes them ends with the last one.
    for _ in 0..2 {
        let server = async {
            let mut stream = accept(&listener).await;
            receive(&mut stream).await;
            stream.write_all(OK).await.unwrap();
            stream
        };
        let (mut stream, response) = tokio::join!(server, send(&client, &address));
        response.unwrap();
        assert_eq!(receive(&mut stream).await, "");
    }
}

/// Whoever mistook a peer port, or another program's, for a node's HTTP port is told that it may be so, and
/// nobody else: a server that has answered speaks HTTP.
#[tokio::test]
async fn who_speaks_no_http_is_told_as_such() {
    let client = HttpClient::new();
    for answer in [&b""[..], b"SSH-2.0-x\r\n"] {
        let (listener, address) = listen().await;
        let server = async {
            let mut stream = accept(&listener).await;
            receive(&mut stream).await;
            stream.write_all(answer).await.unwrap();
        };
        let ((), failed) = tokio::join!(server, send(&client, &address));
        let failed = failed.unwrap_err();
        assert!(matches!(failed, SendError::MaybeSent { .. }), "{failed}");
        assert!(failed.to_string().contains("does not speak HTTP"), "{failed}");
    }
    let (listener, address) = listen().await;
    let server = async {
        let mut stream = accept(&listener).await;
        receive(&mut stream).await;
        stream.write_all(OK).await.unwrap();
        receive(&mut stream).await;
    };
    let both = async {
        send(&client, &address).await.unwrap();
        send(&client, &address).await.unwrap_err()
    };
    let ((), failed) = tokio::join!(server, both);
    assert!(!failed.to_string().contains("HTTP"), "{failed}");
}

/// The connection that has been idle for longest goes when there are too many, whatever its address.
#[tokio::test]
async fn only_so_many_idle_connections_are_kept() {
    let client = HttpClient::keeping(1);
    let mut streams = Vec::new();
    for _ in 0..2 {
        let (listener, address) = listen().await;
        let server = async {
            let mut stream = accept(&listener).await;
            receive(&mut stream).await;
            stream.write_all(OK).await.unwrap();
            stream
        };
        let (stream, response) = tokio::join!(server, send(&client, &address));
        response.unwrap();
        streams.push((stream, address));
    }
    let (mut second, address) = streams.pop().unwrap();
    let (mut first, _) = streams.pop().unwrap();
    assert_eq!(receive(&mut first).await, "", "it was closed");
    let answer = async {
        assert_ne!(receive(&mut second).await, "", "it is used again");
        second.write_all(OK).await.unwrap();
    };
    let ((), response) = tokio::join!(answer, send(&client, &address));
    response.unwrap();
}

/// A client may outlive the runtime that it was first used on, as one in a `static` does in tests.
#[test]
fn a_client_is_used_on_one_runtime_after_another() {
    let servers = Runtime::new().unwrap();
    let (listener, address) = servers.block_on(listen());
    servers.spawn(serve(listener));
    let client = HttpClient::new();
    for _ in 0..3 {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for _ in 0..2 {
            runtime.block_on(send(&client, &address)).unwrap();
        }
    }
}

/// Whoever gives a connection back while its runtime ends must not wait for itself.
#[test]
fn a_runtime_ends_while_connections_come_back() {
    let servers = Runtime::new().unwrap();
    let (listener, address) = servers.block_on(listen());
    servers.spawn(serve(listener));
    let (done, over) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for _ in 0..100 {
            let client = HttpClient::new();
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            for _ in 0..8 {
                let (client, address) = (client.clone(), address.clone());
                runtime.spawn(async move { while send(&client, &address).await.is_ok() {} });
            }
            std::thread::sleep(Duration::from_millis(3));
            drop(runtime);
        }
        done.send(()).unwrap();
    });
    over.recv_timeout(3 * PATIENCE).expect("a runtime hangs");
}

/// hyper skips interim heads, so a connection may be busy for ever and bring nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interim_heads_without_end_do_not_outlast_the_deadline() {
    let (listener, address) = listen().await;
    let server = tokio::spawn(async move {
        let mut stream = accept(&listener).await;
        receive(&mut stream).await;
        let heads = b"HTTP/1.1 100 Continue\r\n\r\n".repeat(4000);
        while stream.write_all(&heads).await.is_ok() {}
    });
    let client = HttpClient::new();
    let deadline = Instant::now() + Duration::from_millis(50);
    let sending = async move { client.send(request_to(&address, b"body"), deadline).await };
    let result = tokio::time::timeout(PATIENCE, tokio::spawn(sending)).await;
    let result = result.expect("it starves the deadline").unwrap();
    assert!(matches!(result, Err(SendError::TimedOut { .. })), "{result:?}");
    server.await.unwrap();
}

/// Room is asked for at once where an answer says how long it is, and else as it comes.
#[tokio::test]
async fn an_answer_without_room_is_given_up() {
    let (listener, address) = listen().await;
    let client = HttpClient::new();
    let announced = "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nfour";
    let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nfour\r\n4\r\nmore\r\n";
    for (answer, room, expected) in
        [(announced, 8, vec![9]), (chunked, 4, vec![0, 4, 4]), (chunked, 3, vec![0, 4])]
    {
        let server = async {
            let mut stream = accept(&listener).await;
            receive(&mut stream).await;
            stream.write_all(answer.as_bytes()).await.unwrap();
            assert_eq!(receive(&mut stream).await, "", "the connection is given up, too");
        };
        let mut asked = Vec::new();
        let mut has_room = |bytes| {
            asked.push(bytes);
            asked.iter().sum::<usize>() <= room
        };
        let (request, deadline) = (request_to(&address, b"body"), Instant::now() + PATIENCE);
        let sending = client.send_for(request, deadline, &mut has_room);
        let ((), result) = tokio::join!(server, sending);
        let error = result.unwrap_err();
        assert!(matches!(error, SendError::NoRoom { .. }), "{error:?}");
        assert!(error.may_have_arrived());
        assert_eq!(asked, expected);
    }
}
