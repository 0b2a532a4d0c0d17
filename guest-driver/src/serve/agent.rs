//! `agent`: an order to become another program. What is said is in `adit_tasks::order`, what becomes of it in `upgrade`.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

use adit_channel::frame;
use adit_channel::hello::Open;
use adit_channel::refusal::Refusal;
use adit_names::ServiceName;
use adit_tasks::order::{Answer, BODY_MAX, Kind, Order, SERVICE, VERSION};

use super::services::{Run, Service};
use crate::live::Live;
use crate::log;
use crate::transport::HostStream;
use crate::upgrade::{Refused, Taken, Upgrade};

/// How long the host may take for its order, and to read the answer.
const LIMIT: Duration = Duration::from_secs(10);

/// The service; it takes no order where there is no upgrade.
pub struct Agent {
    live: Arc<Live>,
    upgrade: Arc<Upgrade>,
}

impl Agent {
    /// Follows orders by the configuration in force.
    pub fn new(live: Arc<Live>, upgrade: Arc<Upgrade>) -> Self {
        Self { live, upgrade }
    }
}

impl Service for Agent {
    fn form(&self) -> &'static str {
        SERVICE
    }

    fn takes(&self, name: &ServiceName) -> bool {
        name.as_str() == SERVICE
    }

    fn open(&self, _: &Open) -> Result<Run, Refusal> {
        let (live, upgrade) = (self.live.clone(), self.upgrade.clone());
        Ok(Box::new(move |stream| follow(&*stream, &live, &upgrade)))
    }
}

fn follow(stream: &dyn HostStream, live: &Live, upgrade: &Arc<Upgrade>) -> io::Result<()> {
    stream.set_timeout(Some(LIMIT))?;
    let Some((header, body)) = frame::read(&mut stream.io(), BODY_MAX)? else {
        return Ok(());
    };
    if (header.kind, header.version) != (Kind::Order as u16, VERSION) {
        return Err(io::Error::new(ErrorKind::InvalidData, "no order"));
    }
    let order: Order = header
        .decode(&body)
        .map_err(|e| io::Error::new(ErrorKind::InvalidData, e))?;
    let taken = upgrade.order(&live.config(), &order.envelope);
    if let Err(refused) = &taken {
        log::event("agent-refused", &[("why", refused)]);
    }
    let bytes = frame::encode(
        Kind::Answer as u16,
        VERSION,
        header.id,
        0,
        &answer(&taken, upgrade.waits()),
    );
    let said = stream.io().write_all(&bytes.map_err(io::Error::other)?);
    let said = said.and_then(|()| stream.end_sending());
    if taken == Ok(Taken::Next) {
        // Also where nobody has heard it: it is on disk.
        upgrade.switch();
    }
    said
}

fn answer(taken: &Result<Taken, Refused>, waits: bool) -> Answer {
    let (refused, text) = match taken {
        Ok(_) => ("", String::new()),
        Err(refused) => (refused.code, refused.text.clone()),
    };
    let text = adit_names::escape(&text).at_most(1024).to_string();
    Answer {
        refused: refused.into(),
        text,
        already: *taken == Ok(Taken::Already),
        waits: waits && *taken == Ok(Taken::Next),
    }
}
