//! What to do about a refused stream, by its code. The API's answers, a VM's last dial and `adit doctor` have it from here.

use adit_channel::refusal::Code;

/// One line.
pub fn of(code: Code) -> &'static str {
    match code {
        // The same for a VM that is not there and for one that the caller may not see.
        Code::UnknownVm => {
            "`adit vm ls` on its host lists the names, and `adit access check` says what a caller may reach"
        }
        Code::Ambiguous => {
            "name the host too: VM.HOST; `adit resolve` says what each of them claims"
        }
        Code::SilentHost => {
            "try again; if it stays so, see that aditd runs on that host: `adit vm ls --all-hosts` says which do not answer"
        }
        Code::NotAllowed => {
            "on the VM's host: `adit access check` says what is missing; `adit vm set` allows a port, a [[grant]] in aditd.toml a caller"
        }
        Code::TooOften => {
            "ask less often, or raise `connections_per_s` of the grant or of the VM in aditd.toml"
        }
        Code::Locked => {
            "wait for whoever locked it, or open it on its host: `adit vm unlock` with its name"
        }
        Code::Denied => {
            "the guest's own list or policy forbids it: `allow_ports` and `[[service]]` in adit-guest.toml, policy.toml"
        }
        Code::NoPortProcess | Code::NoSession | Code::NoAgent => {
            "try again in a moment; on the VM's host, `adit doctor` with its name says what is missing"
        }
        Code::Internal => "the log of aditd has more: `journalctl -u aditd`",
        Code::NoListener => "start the program that listens on that vsock port of the guest",
        Code::DialFailed => "start the server in the guest: nobody listens on that port there",
        Code::NoAnswer | Code::DialTimedOut => {
            "look into the guest: it took the connection, and its server or its agent does not answer"
        }
        Code::Reset => {
            "try again; the log of its port process, RUN/vm/NAME/port.log, says why it ended"
        }
        Code::Foreign => "another program than adit-guest listens on the agent's port in the guest",
        Code::Version | Code::UnknownService | Code::Other(_) => {
            "its agent is of another version: give it the next one by package"
        }
        Code::WrongVm => "the guest is enrolled as another VM: `adit vm show` says as which",
        Code::Busy => "try again; a limit is reached: `[limits]` in aditd.toml",
        Code::TooLarge => "the guest takes no file of that size",
        Code::NoSpace => "make room on the guest's disk",
        Code::Mismatch => "try again: it goes on where it ended",
    }
}
