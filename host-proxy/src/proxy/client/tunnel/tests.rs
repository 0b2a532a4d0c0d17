//! A CONNECT is handed on whole: nothing of its client is read, and nothing overtakes an answer.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::super::super::ends::{ClientIo, UnderWay};
use super::super::*;
use crate::listen::Gate;

/// A client's connection as hyper has it, and the client.
async fn connected() -> (Client, tokio::net::TcpStream, Notes) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = tokio::net::TcpStream::connect(listener.local_addr().unwrap());
    let (far, near) = tokio::join!(client, listener.accept());
    let notes = Notes::default();
    let place = Arc::new(Gate::new(crate::metrics::Listener::new(1)).enter().await);
    let io = ClientIo::new(
        crate::front::stream::Stream::Tcp(near.unwrap().0),
        UnderWay::default(),
    );
    (Client::new(io, place, notes.clone()), far.unwrap(), notes)
}

#[tokio::test]
async fn a_connect_waits_until_the_answer_before_it_is_written() {
    let (mut client, mut far, notes) = connected().await;
    let mut cx = Context::from_waker(std::task::Waker::noop());
    // hyper writes an answer that its client does not take.
    let mut written = 0;
    while let Poll::Ready(n) = Pin::new(&mut client).poll_write(&mut cx, &[b'.'; 65_536]) {
        written += n.unwrap();
    }
    far.write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\nahead")
        .await
        .unwrap();
    let mut room = [0; 100];
    let mut head = ReadBuf::new(&mut room);
    for _ in 0..100 {
        tokio::task::yield_now().await;
        let read = Pin::new(&mut client).poll_read(&mut cx, &mut head);
        assert!(read.is_pending() && head.filled().is_empty());
    }
    let mut taken = vec![0; written];
    far.read_exact(&mut taken).await.unwrap();
    std::future::poll_fn(|cx| Pin::new(&mut client).poll_flush(cx))
        .await
        .unwrap();
    std::future::poll_fn(|cx| Pin::new(&mut client).poll_read(cx, &mut head))
        .await
        .unwrap();
    assert!(head.filled().starts_with(b"CONNECT a:80 "));
    // Its socket is the port process's from here on, with what came along.
    let tunnel = notes.take_tunnel().unwrap().unwrap();
    assert_eq!(tunnel.ahead, b"ahead");
    far.write_all(b"more").await.unwrap();
    std::future::poll_fn(|cx| Pin::new(&mut client).poll_flush(cx))
        .await
        .unwrap();
    let mut more = [0; 4];
    let tunnel = std::net::TcpStream::from(tunnel.fd);
    while tunnel.peek(&mut more).is_err() {
        tokio::task::yield_now().await;
    }
    assert_eq!(&more, b"more");
}

#[tokio::test]
async fn a_connects_client_that_leaves_is_seen_though_nothing_of_it_is_read() {
    for resets in [false, true] {
        let (mut client, mut far, _notes) = connected().await;
        far.write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\nahead")
            .await
            .unwrap();
        let mut room = [0; 100];
        let mut head = ReadBuf::new(&mut room);
        std::future::poll_fn(|cx| Pin::new(&mut client).poll_read(cx, &mut head))
            .await
            .unwrap();
        far.write_all(b"unread").await.unwrap();
        assert!(!client.ended);
        adit_channel::socket_end::reset_on_close(&far, resets);
        drop(far);
        let gone = std::future::poll_fn(|cx| match Pin::new(&mut client).poll_flush(cx) {
            Poll::Ready(Err(_)) => Poll::Ready(true),
            _ if client.ended => Poll::Ready(false),
            _ => Poll::Pending,
        });
        assert_eq!(gone.await, resets);
    }
}
