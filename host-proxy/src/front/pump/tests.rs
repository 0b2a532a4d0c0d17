use std::os::unix::net::UnixStream as StdUnixStream;

use adit_passed::Closer;
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;

use super::*;

const HANG: Duration = Duration::from_secs(30);

/// A pump between a client and a pair: the client, the pair's other end, and the pump.
fn pumping() -> (UnixStream, UnixStream, tokio::task::JoinHandle<bool>) {
    let (client, near) = StdUnixStream::pair().unwrap();
    let (far, pair) = StdUnixStream::pair().unwrap();
    let socket = OwnedFd::from(near.try_clone().unwrap());
    let closer = Closer::default();
    let near = Socket::new(near, &closer).unwrap();
    let pair = Socket::new(pair, &closer).unwrap();
    let pump = tokio::spawn(async move { pump(near, pair, Some(&socket)).await });
    let watched = |socket: StdUnixStream| {
        socket.set_nonblocking(true).unwrap();
        UnixStream::from_std(socket).unwrap()
    };
    (watched(client), watched(far), pump)
}

async fn heard(socket: &mut UnixStream) -> Vec<u8> {
    let mut heard = Vec::new();
    let read = timeout(HANG, socket.read_to_end(&mut heard)).await;
    read.unwrap().unwrap();
    heard
}

#[tokio::test]
async fn each_end_is_passed_on_by_itself_and_both_end_the_pump() {
    let (mut client, mut far, pump) = pumping();
    client.write_all(b"forth").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(heard(&mut far).await, b"forth");
    far.write_all(b"back").await.unwrap();
    far.shutdown().await.unwrap();
    assert_eq!(heard(&mut client).await, b"back");
    // Though neither side has closed.
    timeout(HANG, pump).await.unwrap().unwrap();
    drop((client, far));
}

#[tokio::test]
async fn r117_a_pair_that_is_closed_whole_has_broken_off_and_one_that_ended_has_not() {
    let (mut client, far, pump) = pumping();
    drop(far);
    assert_eq!(heard(&mut client).await, b"");
    assert!(socket_end::is_closed(&client));
    timeout(HANG, pump).await.unwrap().unwrap();
    let (mut client, mut far, _pump) = pumping();
    far.shutdown().await.unwrap();
    assert_eq!(heard(&mut client).await, b"");
    assert!(!socket_end::is_closed(&client));
    client.write_all(b"on").await.unwrap();
    drop(client);
    assert_eq!(heard(&mut far).await, b"on");
}

#[tokio::test(start_paused = true)]
async fn r108_a_client_that_stays_after_everything_is_said_keeps_nothing() {
    // It neither sends nor closes, and nobody would read it.
    let (client, mut far, pump) = pumping();
    far.shutdown().await.unwrap();
    drop(far);
    timeout(HANG, pump).await.unwrap().unwrap();
    // It has ended its sending, and was answered.
    let (mut other, far, pump) = pumping();
    other.shutdown().await.unwrap();
    drop(far);
    timeout(HANG, pump).await.unwrap().unwrap();
    drop((client, other));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_has_gone_ends_a_pump_that_nobody_else_ends() {
    let (client, far, pump) = pumping();
    drop(client);
    timeout(HANG, pump).await.unwrap().unwrap();
    drop(far);
}

#[tokio::test(start_paused = true)]
async fn r67_a_client_that_takes_nothing_of_the_rest_keeps_nothing_in_the_end() {
    let (client, mut far, pump) = pumping();
    let write = async {
        let piece = vec![0; PIECE];
        while timeout(LOOK, far.write_all(&piece)).await.is_ok() {}
    };
    write.await;
    drop(far);
    timeout(2 * TAKE_LIMIT, pump).await.unwrap().unwrap();
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn r67_a_client_that_goes_while_nobody_takes_what_it_sent_keeps_nothing() {
    for half_closed in [false, true] {
        let (mut client, mut far, pump) = pumping();
        let piece = vec![0; PIECE];
        while timeout(LOOK, client.write_all(&piece)).await.is_ok() {}
        if half_closed {
            far.shutdown().await.unwrap();
        }
        drop(client);
        timeout(2 * TAKE_LIMIT, pump).await.unwrap().unwrap();
        assert!(socket_end::is_closed(&far));
    }
    // As long as some is taken in time, the rest has its time as well.
    let (mut client, mut far, pump) = pumping();
    let (piece, mut sent) = (vec![0; PIECE], 0);
    while timeout(LOOK, client.write_all(&piece)).await.is_ok() {
        sent += PIECE;
    }
    drop(client);
    let mut taken = 0;
    loop {
        tokio::time::sleep(GONE_LIMIT / 2).await;
        match far.read(&mut vec![0; PIECE]).await.unwrap() {
            0 => break,
            n => taken += n,
        }
    }
    assert!(taken >= sent, "{taken} of {sent}");
    timeout(HANG, pump).await.unwrap().unwrap();
}
