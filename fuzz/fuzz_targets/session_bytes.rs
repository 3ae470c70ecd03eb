//! What a front-end may write to the socket: any bytes, in pieces, with any descriptors.
//!
//! Oracle: every reply is one to a message that was sent, and well-formed. When the connection is over, every descriptor
//! that came with it is closed, and the next session on the same card is answered.
#![no_main]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use vhost_user_net::vhost_user::session::SessionState;
use vhost_user_net_fuzz::card::{Card, ask};
use vhost_user_net_fuzz::guest::{self, Guest};
use vhost_user_net_fuzz::input::Input;
use vhost_user_net_fuzz::kit::fd_of;
use vhost_user_net_fuzz::kit::memory::memfd;
use vhost_user_net_fuzz::kit::message::{HEADER_LEN, Message, flag};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

fuzz_target!(|data: &[u8]| {
    run(&mut Input::new(data));
});

/// What a front-end may send along.
struct Descriptors {
    card: Card,
    files: [OwnedFd; 6],
}

fn descriptors() -> &'static Descriptors {
    static DESCRIPTORS: OnceLock<Descriptors> = OnceLock::new();
    DESCRIPTORS.get_or_init(|| {
        let (reader, writer) = io::pipe().unwrap();
        let files = [
            fd_of(&EventFd::new(EFD_NONBLOCK).unwrap()).try_clone_to_owned().unwrap(),
            reader.into(),
            writer.into(),
            memfd(4096).into(),
            File::open("/dev/null").unwrap().into(),
            UnixStream::pair().unwrap().0.into(),
        ];
        Descriptors { card: Card::new(true), files }
    })
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn run(input: &mut Input<'_>) {
    let Descriptors { card, files } = descriptors();
    let Guest { mem, .. } = guest::fresh();
    mem.fill(guest::START, 0x4000, 0);
    let before = open_descriptors();
    let (front_end, mut session) = card.connect();
    let mut said = Vec::new();
    let (mut is_open, mut replies) = (true, Vec::new());
    while !input.is_empty() && is_open {
        let count = match input.u8() {
            // Mostly none, or one.
            kind @ 0..240 => usize::from(kind) / 160,
            kind => usize::from(kind - 240) * 3,
        };
        let fds: Vec<BorrowedFd<'_>> = (0..count)
            .map(|_| match input.below(9) {
                region @ 0..3 => mem.regions()[region].fd(),
                other => files[other - 3].as_fd(),
            })
            .collect();
        let len = usize::from(input.u8());
        let bytes = input.bytes(len.max(1));
        said.extend(bytes);
        if front_end.send_bytes(bytes, &fds).is_err() {
            break;
        }
        // A few rounds: it handles some messages at a time.
        for _ in 0..4 {
            match session.process() {
                SessionState::Open => {}
                SessionState::Over => is_open = false,
                SessionState::Failed(stuck) => panic!("{stuck}"),
            }
            front_end.stream().set_nonblocking(true).unwrap();
            let _ = front_end.stream().read_to_end(&mut replies);
            front_end.stream().set_nonblocking(false).unwrap();
        }
    }
    check_replies(&said, &replies);
    drop(session);
    drop(front_end);
    assert_eq!(open_descriptors(), before, "descriptors stay open");
    let (front_end, mut session) = card.connect();
    let features = ask(&front_end, &mut session, &Message::get_features()).expect("an answer");
    assert_eq!(features.u64(), card.nic.offered_features());
}

/// Follows what was said message by message, and finds what was replied in the same order.
fn check_replies(said: &[u8], replies: &[u8]) {
    let messages = messages(said);
    let mut asked = messages.iter().map(|[request, ..]| *request);
    let replied = whole(replies);
    for [request, flags, size] in replied {
        assert_eq!(flags, flag::VERSION | flag::REPLY);
        assert!(size <= 4096 + 12);
        assert!(asked.any(|asked| asked == request), "a reply to request {request}, which was not asked");
    }
}

fn messages(mut bytes: &[u8]) -> Vec<[u32; 3]> {
    let mut all = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<HEADER_LEN>() {
        let words: Vec<u32> = head.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
        all.push([words[0], words[1], words[2]]);
        bytes = rest.get(words[2] as usize..).unwrap_or_default();
    }
    all
}

fn whole(replies: &[u8]) -> Vec<[u32; 3]> {
    let all = messages(replies);
    let len: usize = all.iter().map(|[.., size]| HEADER_LEN + *size as usize).sum();
    assert_eq!(len, replies.len(), "half a reply");
    all
}
