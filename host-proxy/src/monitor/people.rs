//! What the host's user database says of a user. It may take its time, where it is on another machine.

use std::ffi::CString;

use nix::unistd::{Group, Uid, User, getgrouplist};

use super::wire::{Is, WhoIs};

/// Bytes of all group names together at most; more of them do not count.
const GROUPS_BYTES_MAX: usize = 16 << 10;

/// Looks a user up. Blocks.
pub fn look(ask: &WhoIs) -> Is {
    let user = match ask {
        WhoIs::Uid(uid) => User::from_uid(Uid::from_raw(*uid)),
        WhoIs::Name(name) => User::from_name(name),
    };
    let user = match user {
        Ok(user) => user,
        Err(e) => {
            tracing::warn!(error = %e, "the user database does not answer");
            None
        }
    };
    let Some(user) = user else {
        return Is { user: None };
    };
    let name = CString::new(user.name.clone()).unwrap_or_default();
    let gids = getgrouplist(&name, user.gid).unwrap_or_else(|_| vec![user.gid]);
    let mut bytes = 0;
    let mut groups = Vec::new();
    for gid in gids {
        let Ok(Some(group)) = Group::from_gid(gid) else {
            continue;
        };
        bytes += group.name.len();
        if bytes > GROUPS_BYTES_MAX {
            tracing::warn!(
                user = user.name,
                "it is in more groups than count for grants"
            );
            break;
        }
        groups.push(group.name);
    }
    Is {
        user: Some((user.uid.as_raw(), user.name, groups)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_a_user_with_a_group_by_number_and_by_name() {
        let by_number = look(&WhoIs::Uid(0));
        let (uid, name, groups) = by_number.user.clone().unwrap();
        assert_eq!((uid, &*name), (0, "root"));
        assert!(groups.iter().any(|group| group == "root"));
        assert_eq!(look(&WhoIs::Name("root".into())), by_number);
        assert_eq!(look(&WhoIs::Uid(u32::MAX - 7)).user, None);
        assert_eq!(look(&WhoIs::Name("no such user\0".into())).user, None);
    }
}
