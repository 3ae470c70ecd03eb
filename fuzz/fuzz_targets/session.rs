//! Sessions of well-formed messages in any order, with values that are often wrong.
//!
//! Oracle: a model of the session, written from the vhost-user specification and `docs/`: which messages are
//! acknowledged, which refused, which have a reply and what it says. After each, the next one is answered.
#![no_main]

use std::os::fd::AsFd;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use vhost_user_net::vhost_user::session::Session;
use vhost_user_net_fuzz::card::{Card, QUEUE_SIZE_MAX, ask};
use vhost_user_net_fuzz::guest::{self, Guest, SECOND, START};
use vhost_user_net_fuzz::input::Input;
use vhost_user_net_fuzz::kit::fd_of;
use vhost_user_net_fuzz::kit::frontend::RawFrontend;
use vhost_user_net_fuzz::kit::memory::{GuestMemory, RegionInfo, memfd};
use vhost_user_net_fuzz::kit::message::{Message, VRING_F_LOG, VringAddr, request};
use vhost_user_net_fuzz::kit::virtio::{feature, protocol};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A card with one queue pair has room for these; what it runs are the first two.
const RINGS: usize = 6;
const RUN: usize = 2;

fuzz_target!(|data: &[u8]| {
    static CARD: OnceLock<Card> = OnceLock::new();
    let card = CARD.get_or_init(|| Card::new(false));
    let Guest { mem, .. } = guest::fresh();
    // Empty rings, wherever they are said to be.
    mem.fill(START, (guest::HOLE - START) as usize, 0);
    let (front_end, session) = card.connect();
    let model = Model { offered: card.nic.offered_features(), ..Model::default() };
    Scene { front_end, session, mem, model }.run(&mut Input::new(data));
});

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Waiting,
    Enabled,
    Disabled,
}

#[derive(Clone, Copy, Default)]
struct Ring {
    size: Option<u16>,
    at: Option<VringWords>,
    used_log: Option<u64>,
    base: u32,
    has_kick: bool,
    is_started: bool,
    is_lost: bool,
    mode: Mode,
}

type VringWords = (u64, u64, u64);

#[derive(Default)]
struct Model {
    offered: u64,
    protocol: u64,
    features: u64,
    /// Of a legacy driver, and refused.
    is_legacy: bool,
    status: u8,
    regions: Vec<RegionInfo>,
    /// Bytes of the log of written pages.
    log: Option<u64>,
    rings: [Ring; RINGS],
}

/// Whether a log of so many bytes has a bit for the page of `addr`.
fn has_bit(log: u64, addr: u64) -> bool {
    addr / 4096 / 8 < log
}

/// What a message is answered with.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Ack(bool),
    Number(u64),
    Base(u32, u32),
    /// The same again, or nothing but zeros.
    Log(bool),
    Any,
}

impl Model {
    fn stop(&mut self, index: usize) {
        let ring = &mut self.rings[index];
        if ring.is_started {
            // The rings are empty.
            ring.base = 0;
            if ring.mode == Mode::Disabled {
                ring.mode = Mode::Waiting;
            }
        }
        (ring.is_started, ring.has_kick, ring.is_lost) = (false, false, false);
    }

    /// Whether the message about a stopped ring may change it.
    fn is_stopped(&mut self, index: usize) -> bool {
        if self.rings[index].mode == Mode::Disabled {
            self.stop(index);
        }
        !self.rings[index].is_started
    }

    /// Whether a log has bits for all of these regions.
    fn is_covered(log: u64, regions: &[RegionInfo]) -> bool {
        regions.iter().all(|region| has_bit(log, region.guest + region.size - 1))
    }

    /// The same where it has to, by the features. A log that has not, and that no ring uses, is gone.
    fn may_have(&mut self, features: u64, regions: &[RegionInfo]) -> bool {
        if self.log.is_none_or(|log| Model::is_covered(log, regions)) {
            return true;
        }
        if features & feature::LOG_ALL != 0 && self.rings.iter().any(|ring| ring.is_started) {
            return false;
        }
        if !self.rings.iter().any(|ring| ring.is_started && ring.used_log.is_some()) {
            self.log = None;
        }
        true
    }

    /// Whether the used ring of such a ring can be logged where it is to be.
    fn is_logged(log: Option<u64>, size: u16, used_log: Option<u64>) -> bool {
        let (Some(log), Some(addr)) = (log, used_log) else { return true };
        addr.checked_add(5 + 8 * u64::from(size)).is_some_and(|last| has_bit(log, last))
    }

    /// Whether a ring of that size is all in memory, aligned, and its used ring apart, and can be logged.
    fn fits(&self, size: u16, (desc, avail, used): VringWords, used_log: Option<u64>) -> bool {
        if !Model::is_logged(self.log, size, used_log) {
            return false;
        }
        let n = u64::from(size);
        let areas = [(desc, 16 * n, 16), (avail, 6 + 2 * n, 2), (used, 6 + 8 * n, 4)];
        let place = |user: u64| {
            let region = self.regions.iter().find(|region| (region.user..region.user + region.size).contains(&user))?;
            Some(region.guest + (user - region.user))
        };
        let Some(found) =
            areas.iter().map(|(user, len, align)| Some((place(*user)?, *len, *align))).collect::<Option<Vec<_>>>()
        else {
            return false;
        };
        let is_there = |addr: u64, len: u64| {
            // Region after region, as far as they are neighbours.
            let mut at = addr;
            while at < addr + len {
                match self.regions.iter().find(|region| (region.guest..region.guest + region.size).contains(&at)) {
                    Some(region) => at = region.guest + region.size,
                    None => return false,
                }
            }
            true
        };
        let (used, used_len, _) = found[2];
        let is_apart = found[..2].iter().all(|(addr, len, _)| addr + len <= used || used + used_len <= *addr);
        is_apart && found.iter().all(|(addr, len, align)| addr % align == 0 && is_there(*addr, *len))
    }

    /// Starts a ring if all is known of it; whether nothing is wrong with it.
    fn start(&mut self, index: usize) -> bool {
        let ring = self.rings[index];
        let (Some(size), Some(at), true) = (ring.size, ring.at, ring.has_kick) else { return true };
        if self.is_legacy || self.features & feature::VERSION_1 == 0 || ring.is_started {
            return true;
        }
        if ring.is_lost && !self.fits(size, at, ring.used_log) {
            return true;
        }
        self.rings[index].has_kick = false;
        if index >= RUN {
            return true;
        }
        if !self.fits(size, at, ring.used_log) {
            return false;
        }
        let ring = &mut self.rings[index];
        (ring.is_started, ring.is_lost) = (true, false);
        if self.features & feature::PROTOCOL_FEATURES == 0 {
            ring.mode = Mode::Enabled;
        }
        true
    }

    fn set_features(&mut self, bits: u64) -> bool {
        let front_ends_own = feature::PROTOCOL_FEATURES | feature::LOG_ALL;
        let is_modern = bits & feature::VERSION_1 != 0 || bits & !front_ends_own == 0;
        let rings_run = self.rings.iter().any(|ring| ring.is_started && ring.mode != Mode::Disabled);
        if bits & !self.offered != 0 || !is_modern && rings_run {
            return false;
        }
        self.is_legacy = !is_modern;
        if self.is_legacy {
            return false;
        }
        let any_started = self.rings.iter().any(|ring| ring.is_started);
        if self.features & feature::VERSION_1 != 0 && bits ^ self.features == feature::LOG_ALL && any_started {
            let begins = bits & feature::LOG_ALL != 0;
            if begins && self.log.is_none() || !self.may_have(bits, &self.regions.clone()) {
                return false;
            }
            self.features = bits;
            return self.set_regions(self.regions.clone());
        }
        if rings_run {
            return bits == self.features;
        }
        if !self.may_have(bits, &self.regions.clone()) {
            return false;
        }
        (0..RINGS)
            .filter(|index| self.rings[*index].mode == Mode::Disabled)
            .collect::<Vec<_>>()
            .into_iter()
            .for_each(|index| self.stop(index));
        self.features = bits;
        for index in 0..RINGS {
            self.start(index);
        }
        true
    }

    /// Takes the place of the log that there is.
    fn set_log(&mut self, size: u64) -> bool {
        let is_logged = |ring: &Ring| Model::is_logged(Some(size), ring.size.unwrap_or(1), ring.used_log);
        let are_logged = self.rings.iter().filter(|ring| ring.is_started).all(is_logged);
        if !are_logged || !Model::is_covered(size, &self.regions) {
            return false;
        }
        self.log = Some(size);
        self.set_regions(self.regions.clone())
    }

    fn set_regions(&mut self, regions: Vec<RegionInfo>) -> bool {
        if !self.may_have(self.features, &regions) {
            return false;
        }
        self.regions = regions;
        for index in 0..RINGS {
            let Ring { size: Some(size), at: Some(at), used_log, is_started: true, .. } = self.rings[index] else {
                continue;
            };
            if !self.fits(size, at, used_log) {
                self.stop(index);
                // It waits with its kick for its memory to come back.
                (self.rings[index].has_kick, self.rings[index].is_lost) = (true, true);
            }
        }
        for index in 0..RINGS {
            let Ring { size: Some(size), at: Some(at), used_log, is_lost: true, .. } = self.rings[index] else {
                continue;
            };
            if self.fits(size, at, used_log) {
                self.start(index);
            }
        }
        true
    }

    fn reset(&mut self) {
        for index in 0..RINGS {
            self.stop(index);
            let ring = &mut self.rings[index];
            (ring.size, ring.at, ring.mode) = (None, None, Mode::Waiting);
        }
        (self.features, self.is_legacy, self.status) = (0, false, 0);
    }
}

struct Scene {
    front_end: RawFrontend,
    session: Session,
    mem: &'static GuestMemory,
    model: Model,
}

impl Scene {
    fn run(mut self, input: &mut Input<'_>) {
        // Most sessions begin so; without acknowledgements there is little to see.
        if input.below(8) != 0 {
            let all = self.offered_protocol();
            self.tell(Message::set_protocol_features(all), |model| {
                model.protocol = all;
                Answer::Ack(true)
            });
        }
        while !input.is_empty() {
            self.step(input);
        }
    }

    fn offered_protocol(&mut self) -> u64 {
        ask(&self.front_end, &mut self.session, &Message::get_protocol_features()).expect("a reply").u64()
    }

    /// Sends a message that asks for an acknowledgement, and compares.
    fn tell(&mut self, message: Message<'_>, expect: impl FnOnce(&mut Model) -> Answer) {
        let message = message.with_need_reply();
        // Whether it may be acknowledged is decided after it was handled.
        let wanted = expect(&mut self.model);
        let acks = self.model.protocol & protocol::REPLY_ACK != 0;
        let reply = ask(&self.front_end, &mut self.session, &message);
        let what = || format!("{message:?}");
        match (wanted, reply) {
            (Answer::Ack(is_good), Some(reply)) if acks => {
                assert_eq!(reply.u64(), u64::from(!is_good), "{}", what());
            }
            (Answer::Ack(_), None) if !acks => {}
            (Answer::Number(number), Some(reply)) => assert_eq!(reply.u64(), number, "{}", what()),
            (Answer::Base(index, base), Some(reply)) => assert_eq!(reply.vring_state(), (index, base), "{}", what()),
            (Answer::Log(is_good), Some(reply)) => {
                assert_eq!(reply.body, if is_good { message.body.clone() } else { vec![0; 16] }, "{}", what());
            }
            (Answer::Any, Some(_)) => {}
            (wanted, reply) => panic!("{} should be answered with {wanted:?}: {reply:?}", what()),
        }
    }

    /// The same for a message that a protocol feature allows.
    fn tell_if(&mut self, needed: u64, message: Message<'_>, expect: impl FnOnce(&mut Model) -> Answer) {
        self.tell(message, |model| if model.protocol & needed == 0 { Answer::Ack(false) } else { expect(model) });
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let eventfd = EventFd::new(EFD_NONBLOCK).unwrap();
        let file = memfd(4096);
        // Mostly one of those that run.
        let index = match input.u8() {
            255 => input.u32(),
            254 => 6,
            index => u32::from(index % 4 + u8::from(index > 200) * 2),
        };
        let is_ring = (index as usize) < RINGS;
        let at = index as usize;
        match input.below(19) {
            0 if input.flag() => self.tell(Message::set_owner(), |_| Answer::Ack(true)),
            0 => self.tell(Message::reset_owner(), |model| {
                for ring in &mut model.rings {
                    ring.mode = if ring.is_started { Mode::Disabled } else { Mode::Waiting };
                }
                Answer::Ack(true)
            }),
            1 => {
                let offered = self.offered_protocol();
                let bits = if input.flag() { offered & !input.u64() } else { input.u64() };
                self.tell(Message::set_protocol_features(bits), |model| {
                    let is_good = bits & !offered == 0;
                    model.protocol = if is_good { bits } else { model.protocol };
                    Answer::Ack(is_good)
                });
            }
            2 => {
                let base = feature::VERSION_1 | feature::PROTOCOL_FEATURES;
                let bits = match input.below(6) {
                    0 => input.u64(),
                    5 => self.model.offered & input.u64(),
                    4 => self.model.features ^ feature::LOG_ALL,
                    1 => feature::VERSION_1,
                    2 => base | (self.model.offered & input.u64()),
                    _ => base,
                };
                self.tell(Message::set_features(bits), |model| Answer::Ack(model.set_features(bits)));
            }
            3 => {
                let chosen = input.below(8);
                let regions: Vec<_> = (0..3).filter(|at| chosen >> at & 1 == 1).collect();
                let all = self.mem.regions();
                let mut infos: Vec<_> = regions.iter().map(|at| all[*at].info).collect();
                let mut fds: Vec<_> = regions.iter().map(|at| all[*at].fd()).collect();
                let is_good = match input.below(8) {
                    0 => {
                        fds.pop();
                        false
                    }
                    1 => {
                        infos.iter_mut().for_each(|info| info.size *= 2);
                        false
                    }
                    2 => {
                        fds.iter_mut().for_each(|fd| *fd = fd_of(&eventfd));
                        false
                    }
                    _ => !infos.is_empty(),
                };
                self.tell(Message::set_mem_table_claiming(&infos).with_fds(fds), |model| {
                    Answer::Ack(is_good && model.set_regions(infos))
                });
            }
            4 => {
                let region = &self.mem.regions()[input.below(3)];
                let info = region.info;
                self.tell_if(protocol::CONFIGURE_MEM_SLOTS, Message::add_mem_reg(region), |model| {
                    let is_there = model.regions.contains(&info);
                    let more = model.regions.iter().copied().chain([info]).collect();
                    Answer::Ack(is_there || model.set_regions(more))
                });
            }
            5 => {
                let info = self.mem.regions()[input.below(3)].info;
                self.tell_if(protocol::CONFIGURE_MEM_SLOTS, Message::rem_mem_reg(&info), |model| {
                    let is_there = model.regions.contains(&info);
                    let left = model.regions.iter().copied().filter(|region| *region != info).collect();
                    // What is not there at all is removed already.
                    Answer::Ack(!is_there || model.set_regions(left))
                });
            }
            6 => {
                let num = if input.flag() { 1 << input.below(12) } else { input.u32() >> input.below(32) };
                self.tell(Message::set_vring_num(index, num), |model| {
                    let is_good =
                        is_ring && num.is_power_of_two() && num <= QUEUE_SIZE_MAX.into() && model.is_stopped(at);
                    if is_good {
                        model.rings[at].size = Some(num as u16);
                    }
                    Answer::Ack(is_good && model.start(at))
                });
            }
            7 => {
                let base = if input.flag() { u32::from(input.u16()) } else { input.u32() };
                self.tell(Message::set_vring_base(index, base), |model| {
                    let is_good = is_ring && base < 0x1_0000;
                    // One that is complete and was not used carries on where it is, whatever is said.
                    if is_good && model.rings[at].is_started && model.rings[at].mode == Mode::Waiting {
                        return Answer::Ack(true);
                    }
                    let is_good = is_good && model.is_stopped(at);
                    if is_good {
                        model.rings[at].base = base;
                    }
                    Answer::Ack(is_good)
                });
            }
            8 | 9 => self.set_address(input, index),
            10 | 11 => {
                let (message, is_good) = ring_fd(input, request::SET_VRING_KICK, index, &eventfd, &file);
                self.tell(message, |model| {
                    let is_good = is_good && is_ring;
                    if is_good && !model.rings[at].is_started {
                        model.rings[at].has_kick = true;
                    }
                    Answer::Ack(is_good && model.start(at))
                });
            }
            12 => {
                let request = if input.flag() { request::SET_VRING_CALL } else { request::SET_VRING_ERR };
                let (message, is_good) = ring_fd(input, request, index, &eventfd, &file);
                self.tell(message, |_| Answer::Ack(is_good && is_ring));
            }
            13 => {
                let enable = u32::from(input.u8() % 3);
                self.tell(Message::set_vring_enable(index, enable), |model| {
                    if !is_ring || enable > 1 {
                        return Answer::Ack(false);
                    }
                    let ring = &mut model.rings[at];
                    ring.mode = match (enable, ring.is_started && ring.mode != Mode::Waiting) {
                        (1, _) => Mode::Enabled,
                        (_, true) => Mode::Disabled,
                        (_, false) => Mode::Waiting,
                    };
                    Answer::Ack(true)
                });
            }
            14 => self.tell(Message::get_vring_base(index), |model| {
                if !is_ring {
                    return Answer::Base(index, 0);
                }
                model.stop(at);
                Answer::Base(index, model.rings[at].base)
            }),
            15 => {
                let status = if input.flag() { 0 } else { u64::from(input.u16()) };
                self.tell_if(protocol::STATUS, Message::u64(request::SET_STATUS, status), |model| {
                    match status {
                        0 => model.reset(),
                        1..256 => model.status = status as u8,
                        _ => {}
                    }
                    Answer::Ack(status < 256)
                });
            }
            16 if input.flag() => self.tell_if(protocol::RESET_DEVICE, Message::reset_device(), |model| {
                model.reset();
                Answer::Ack(true)
            }),
            16 => {
                let mtu = u64::from(input.u32()) >> input.below(32);
                self.tell_if(protocol::MTU, Message::set_mtu(mtu), |_| Answer::Ack((68..0x1_0000).contains(&mtu)));
            }
            17 => self.set_log(input),
            _ => match input.below(4) {
                0 => self.tell(Message::get_features(), |model| Answer::Number(model.offered)),
                1 => self.tell(Message::get_status(), |model| Answer::Number(model.status.into())),
                2 => self.tell(Message::get_queue_num(), |_| Answer::Number(3)),
                // Refused or not, it has an answer of its own.
                _ => self.tell(Message::get_config(input.u32() >> input.below(32), input.u8().into()), |_| Answer::Any),
            },
        }
    }

    fn set_log(&mut self, input: &mut Input<'_>) {
        let file = memfd(1 << 20);
        let size = u64::from(input.u32()) >> input.below(32);
        let offset = if input.flag() { 0 } else { u64::from(input.u16()) };
        let is_file_good = size > 0 && offset + size <= 1 << 20;
        let message = Message::set_log_base(size, offset, file.as_fd());
        if self.model.protocol & protocol::LOG_SHMFD == 0 {
            return self.tell(message, |_| Answer::Ack(false));
        }
        let is_good = is_file_good && self.model.set_log(size);
        if !is_good && self.model.features & feature::LOG_ALL != 0 {
            // The session would end.
            return;
        }
        if !is_good {
            self.model.log = None;
        }
        // An empty one at the start is as the answer to a refusal.
        self.tell(message, |_| Answer::Log(is_good));
    }

    fn set_address(&mut self, input: &mut Input<'_>, index: u32) {
        let at = index as usize;
        let ring = u64::from(index % 8);
        // Each ring has a place for 64 descriptors, and there is one over the border of two regions.
        let place = if input.below(8) == 0 { SECOND - 512 } else { START + 0x800 * ring };
        let user = |guest: u64| guest + vhost_user_net_fuzz::kit::memory::USER_OFFSET;
        let mut addr =
            VringAddr { flags: 0, desc: user(place), avail: user(place) + 1024, used: user(place) + 1200, log: 0 };
        match input.u8() {
            0 => addr.desc = input.u64(),
            1 => addr.avail += u64::from(input.u8()),
            2 => addr.used += u64::from(input.u8()),
            3 => addr.used = addr.desc + u64::from(input.u16()),
            4 => addr.flags = input.u8().into(),
            6..64 => (addr.flags, addr.log) = (VRING_F_LOG, u64::from(input.u32()) >> input.below(32)),
            5 => addr.desc = user(guest::END) - u64::from(input.u16()),
            _ => {}
        }
        let words = (addr.desc, addr.avail, addr.used);
        let used_log = (addr.flags == VRING_F_LOG).then_some(addr.log);
        self.tell(Message::set_vring_addr_raw(index, &addr), |model| {
            if at >= RINGS || addr.flags & !VRING_F_LOG != 0 {
                return Answer::Ack(false);
            }
            let size = model.rings[at].size.unwrap_or(1);
            if model.rings[at].is_started {
                // Of a ring that runs only where it is logged can change.
                let is_good = model.rings[at].at == Some(words) && model.fits(size, words, used_log);
                if is_good {
                    model.rings[at].used_log = used_log;
                }
                return Answer::Ack(is_good);
            }
            model.is_stopped(at);
            let is_good = model.fits(size, words, used_log);
            if is_good {
                (model.rings[at].at, model.rings[at].used_log) = (Some(words), used_log);
            }
            Answer::Ack(is_good && model.start(at))
        });
    }
}

/// A message with a ring's descriptor: a good one, none and saying so, a file, or not as it says.
fn ring_fd<'fd>(
    input: &mut Input<'_>,
    request: u32,
    index: u32,
    eventfd: &'fd EventFd,
    file: &'fd std::fs::File,
) -> (Message<'fd>, bool) {
    let index = u64::from(index);
    if index > 0xff {
        // What is no index and no flag.
        return (Message::u64(request, index | 1 << 9).with_fd(fd_of(eventfd)), false);
    }
    match input.below(8) {
        0 => (Message::u64(request, index), false),
        1 => (Message::set_vring_no_fd(request, index).with_fd(fd_of(eventfd)), false),
        2 => (Message::u64(request, index).with_fd(file.as_fd()), false),
        3 => (Message::u64(request, index | 1 << 9).with_fd(fd_of(eventfd)), false),
        4 | 5 => (Message::set_vring_no_fd(request, index), true),
        _ => (Message::u64(request, index).with_fd(fd_of(eventfd)), true),
    }
}
