//! Follows the interface while the process runs: tells the guest of its link and MTU, and handles its deletion and
//! return.
//!
//! rtnetlink reports changes at once. If the interface is out of its reach, a worker that finds its queue dead raises
//! an alarm; a MACVTAP's queue does not show that the MACVTAP was deleted, so it is polled each second. Once the
//! interface is gone, the daemon waits for one of its name (or of the name of its parent), and opens it as at the
//! start. A failed attempt may itself have made an interface and deleted it again, which rtnetlink reports, too: so the
//! events of an attempt are discarded, and there is a pause between two attempts.

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use event_manager::EventOps;

use super::{Daemon, DaemonError, Token, unwatch, watch};
use crate::card_config::ConfigChange;
use crate::device::link_watch::{LinkEvent, LinkState, LinkStatistics, LinkWatch};
use crate::host_side::{HostSide, OnLoss, OpenError, Opened};
use crate::vhost_user::session::{Session, Told};

/// How often to check whether an interface was deleted, if no event would tell.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// How often, and how many times, to try to open an interface that came back: whoever makes it may not be done with it.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);
const RETRIES: u32 = 50;

/// The state of following the interface.
pub(super) struct Following {
    host: HostSide,
    watch: Option<LinkWatch>,
    is_lost: bool,
    /// When to check whether the interface was deleted, if no event would tell.
    probe_at: Option<Instant>,
    retry_at: Option<Instant>,
    retries: u32,
    /// The last error in opening it again, so that each is logged once.
    refusal: String,
}

impl Following {
    pub(super) fn new(host: HostSide, watch: Option<LinkWatch>) -> Following {
        Following { host, watch, is_lost: false, probe_at: None, retry_at: None, retries: 0, refusal: String::new() }
    }

    /// When something is due next.
    pub(super) fn deadline(&self) -> Option<Instant> {
        [self.probe_at, self.retry_at].into_iter().flatten().min()
    }

    /// Whether a new interface of its name can be waited for, once the interface is gone.
    fn can_come_back(&self) -> bool {
        self.watch.is_some() && self.host.can_reopen()
    }
}

impl Daemon {
    /// The host's counters of the interface, if it is within reach; rx and tx are the host's.
    pub(super) fn interface_counters(&self) -> Option<String> {
        let LinkStatistics { rx_dropped, tx_dropped } = self.following.watch.as_ref()?.statistics().ok()?;
        let sockets = self.nic.socket_drops().map(|dropped| format!(" sockets_dropped={dropped}")).unwrap_or_default();
        Some(format!("interface rx_dropped={rx_dropped} tx_dropped={tx_dropped}{sockets}"))
    }

    pub(super) fn begin_following(&mut self, ops: &mut EventOps) {
        if let Some(link) = &self.following.watch {
            let watched = watch(link.as_fd().as_raw_fd(), Token::Link, ops);
            self.fail_unless(watched);
            // Takes the state that was asked for when the watch was made, so that no front-end gets it as a change
            // later.
            self.follow_link(ops);
        }
        if self.nic.device_ends_silently() {
            self.following.probe_at = Some(Instant::now() + PROBE_INTERVAL);
        }
    }

    /// Handles what happened to the interface.
    pub(super) fn follow_link(&mut self, ops: &mut EventOps) {
        while let Some(link) = self.following.watch.as_ref().filter(|_| !self.has_ended) {
            match link.next_event() {
                Ok(Some(LinkEvent::Is(state))) => self.take_state(state),
                Ok(Some(LinkEvent::Gone)) => {
                    self.look_for_loss(ops);
                    self.follow_from_afar(ops);
                }
                Ok(Some(LinkEvent::Appeared)) => self.try_now(ops),
                Ok(None) => return,
                Err(error) => {
                    log::warn!("Events of interfaces were missed, asking anew: {error}");
                    if let Err(error) = link.ask() {
                        log::error!("Cannot hear of the interface any more: {error}");
                        self.stop_watching(ops);
                    }
                    // The missed events may include its return. Its state is reported again.
                    return self.try_now(ops);
                }
            }
        }
    }

    pub(super) fn take_alarm(&mut self, ops: &mut EventOps) {
        // The count of the eventfd is of no interest.
        let _ = self.nic.alarm().read();
        self.look_for_lost_memory(ops);
        self.look_for_loss(ops);
    }

    pub(super) fn follow_by_time(&mut self, now: Instant, ops: &mut EventOps) {
        if self.following.probe_at.take_if(|at| *at <= now).is_some() {
            self.look_for_loss(ops);
            self.following.probe_at = (!self.following.is_lost).then_some(now + PROBE_INTERVAL);
        }
        if self.following.retry_at.take_if(|at| *at <= now).is_some() {
            self.open_again(ops);
        }
    }

    /// Takes over the interface's state, and tells the guest if the front-end can be told.
    fn take_state(&mut self, state: LinkState) {
        let change = match self.nic.follow(state) {
            Ok(change) => change,
            Err(stuck) => return self.fail(stuck.into()),
        };
        if change.is_none() {
            return;
        }
        let told = match self.session.as_mut().map(Session::tell_config_change) {
            Some(Told::Now) => "; the guest is told",
            Some(Told::Later) => "; the guest is told once its rings run",
            Some(Told::Never) => {
                self.nic.count_untold_change();
                "; this front-end has no way to tell the guest"
            }
            None => "",
        };
        log::info!("Interface {:?}: {}{told}", self.nic.device_name(), Shown(change));
    }

    /// Checks whether the interface was deleted, and handles that.
    fn look_for_loss(&mut self, ops: &mut EventOps) {
        match self.nic.lose_deleted_device() {
            Ok(true) if !self.following.is_lost => self.lose_device(ops),
            Ok(_) => {}
            Err(stuck) => self.fail(stuck.into()),
        }
    }

    /// Handles the move of an interface that is not lost to another network namespace, from where no events come; its
    /// queues go on.
    fn follow_from_afar(&mut self, ops: &mut EventOps) {
        if self.following.is_lost || self.has_ended {
            return;
        }
        self.stop_watching(ops);
        // The move itself took the interface down. From now on only its queues tell of its state, so the link counts as
        // up.
        self.take_state(LinkState { is_up: true, mtu: None });
        // Logged only now: whoever reads this line may rely on it that frames pass.
        log::info!("Interface {:?} was moved to another network namespace", self.nic.device_name());
        self.following.probe_at = Some(Instant::now() + PROBE_INTERVAL);
    }

    fn lose_device(&mut self, ops: &mut EventOps) {
        self.following.is_lost = true;
        let name = self.nic.device_name();
        if self.following.host.on_loss == OnLoss::Exit {
            return self.fail(DaemonError::DeviceLost { name });
        }
        if self.following.can_come_back() {
            log::error!(
                "Interface {name:?} was deleted; waiting for one of that name (--on-device-loss exit ends instead)"
            );
        } else {
            log::error!("Interface {name:?} was deleted; to go on, make it anew and start this process again");
            self.stop_watching(ops);
        }
        self.take_state(LinkState { is_up: false, mtu: None });
    }

    /// Tries to open an interface of the name, which is there or may be: at once, or, if the last attempt was a moment
    /// ago, soon.
    fn try_now(&mut self, ops: &mut EventOps) {
        self.following.retries = RETRIES;
        if self.following.retry_at.is_none() {
            self.open_again(ops);
        }
    }

    /// Tries to go on with an interface that came back.
    fn open_again(&mut self, ops: &mut EventOps) {
        let host = &self.following.host;
        if !self.following.is_lost || !host.can_reopen() {
            return;
        }
        match host.reopen(self.nic.made_with_mac()).and_then(|opened| self.go_on_with(opened, ops)) {
            Ok(()) => log::info!("Interface {:?} is back; frames pass again", self.nic.device_name()),
            Err(error) => self.try_again_later(&error),
        }
    }

    fn go_on_with(&mut self, opened: Opened, ops: &mut EventOps) -> Result<(), OpenError> {
        self.nic.replace_device(opened.device, opened.queues)?;
        self.stop_watching(ops);
        self.following = Following::new(self.following.host.clone(), opened.watch);
        self.begin_following(ops);
        Ok(())
    }

    fn try_again_later(&mut self, error: &OpenError) {
        let following = &mut self.following;
        // Discards the events of what the attempt made and deleted. Others' events of these milliseconds go, too; the
        // next attempt makes up for that.
        while let Some(Ok(Some(_))) = following.watch.as_ref().map(LinkWatch::next_event) {}
        let refusal = crate::error_chain(&**error).to_string();
        if following.refusal != refusal {
            log::warn!("The interface cannot be opened again yet: {refusal}");
            following.refusal = refusal;
        }
        following.retries = following.retries.saturating_sub(1);
        following.retry_at = (following.retries > 0).then(|| Instant::now() + RETRY_INTERVAL);
    }

    fn stop_watching(&mut self, ops: &mut EventOps) {
        if let Some(link) = self.following.watch.take() {
            unwatch(&link, Token::Link, ops);
        }
    }
}

/// Shows a change in words.
struct Shown(ConfigChange);

impl std::fmt::Display for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let link = self.0.link_up.map(|up| if up { "link up" } else { "link down" });
        match (link, self.0.mtu) {
            (Some(link), Some(mtu)) => write!(f, "{link}, MTU {mtu}"),
            (Some(link), None) => f.write_str(link),
            (None, Some(mtu)) => write!(f, "MTU {mtu}"),
            (None, None) => f.write_str("unchanged"),
        }
    }
}
