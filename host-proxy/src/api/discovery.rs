//! Targets for Prometheus' `http_sd_configs`: one group a VM that may be reached at the port, also where it does not run, because
//! a target that is missing raises no alert.
//!
//! | label | |
//! |---|---|
//! | `vm` | the VM's name |
//! | `__meta_adit_state` | its state, as `adit vm ls` has it |
//! | `__meta_adit_label_NAME` | a label of the card that this host believes |
//!
//! Labels of cards have a prefix that Prometheus drops unless a rule keeps them: one that a card's signer calls `job`, or worse,
//! changes no target. Prometheus refuses the whole list for one name that it does not take, so what it does not take is `_`.

use std::collections::BTreeMap;

use adit_api::{Targets, Vm};
use axum::Json;
use axum::extract::{Query, State as Shared};
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa::IntoParams;

use super::{Answer, ApiError, App, Asks};
use crate::access::Verb;
use crate::reach::destination::{canonical, shown};

/// Of Prometheus' node exporter.
const PORT: u16 = 9100;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct DiscoveryQuery {
    /// Which port; 9100 if it is not given.
    #[param(value_type = Option<u16>, minimum = 1, maximum = 65535)]
    port: Option<String>,
}

/// Targets for Prometheus.
#[utoipa::path(
    get,
    path = "/sd/prometheus",
    params(DiscoveryQuery),
    responses((status = 200, body = Vec<Targets>, description = "One group a VM"))
)]
pub(super) async fn targets(
    Shared(state): Shared<App>,
    asks: Asks,
    Query(query): Query<DiscoveryQuery>,
) -> Answer<Vec<Targets>> {
    let port = match query.port {
        None => PORT,
        Some(text) => canonical(&text).ok_or_else(|| {
            let message = format!("`{}` is no port: 1 to 65535, digits only", shown(&text));
            ApiError::new(StatusCode::BAD_REQUEST, "usage", message)
        })?,
    };
    let mut vms = state.registry.all();
    vms.retain(|vm| asks.sees(&state, Verb::See, vm.name.as_str()));
    let reached = vms.iter().filter(|vm| vm.spec().allow.contains(&port));
    Ok(Json(reached.map(|vm| group(&vm.show(), port)).collect()))
}

fn group(vm: &Vm, port: u16) -> Targets {
    let mut labels = BTreeMap::from([
        ("vm".to_owned(), vm.name.clone()),
        ("__meta_adit_state".to_owned(), vm.state.name().to_owned()),
    ]);
    for (name, value) in &vm.labels {
        // Of two that become one, the first by name.
        let label = labels.entry(format!("__meta_adit_label_{}", label_name(name)));
        label.or_insert_with(|| value.clone());
    }
    Targets {
        targets: vec![format!("{}:{port}", vm.name)],
        labels,
    }
}

/// A label's name of letters, digits and `_`.
fn label_name(name: &str) -> String {
    name.replace(|c: char| !c.is_ascii_alphanumeric(), "_")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::VmConfig;
    use crate::vm::{Origin, VmEntry};

    #[test]
    fn labels_of_a_card_move_no_target_and_have_names_that_prometheus_takes() {
        let config = VmConfig::new("web-1".parse().unwrap(), 3);
        let mut vm = VmEntry::new(Path::new("/run/adit"), config, Origin::Api).show();
        let card = [
            ("example.com/tier", "web"),
            ("example_com-tier", "other"),
            ("job", "mine"),
            ("vm", "web-9"),
            ("a__address__", "web-9:22"),
        ];
        vm.labels = card.map(|(n, v)| (n.to_owned(), v.to_owned())).into();
        let group = group(&vm, 9100);
        assert_eq!(group.targets, ["web-1:9100"]);
        assert_eq!(group.labels["vm"], "web-1");
        assert_eq!(group.labels["__meta_adit_label_example_com_tier"], "web");
        assert_eq!(group.labels["__meta_adit_label_job"], "mine");
        for name in group.labels.keys() {
            assert!(name == "vm" || name.starts_with("__meta_adit_"), "{name}");
            let mut chars = name.chars();
            assert!(
                chars.all(|c| c.is_ascii_alphanumeric() || c == '_'),
                "{name}"
            );
        }
    }
}
