//! The arithmetic of etcd's quorum: which member may go without taking the cluster's memory with it.
//!
//! A change of n members needs n/2 + 1 of them, and so does every write after it. Pure: who is a member and who is
//! healthy is told by whoever observed it.

/// One voting member of etcd, as observed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name, which is its node's.
    pub name: String,
    /// Whether it answered as a member that can commit.
    pub healthy: bool,
}

/// Why a member must stay.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuorumError {
    /// Nobody of that name votes.
    #[error("{name} is no etcd member; members are {members}")]
    Unknown {
        /// Who was to be removed.
        name: String,
        /// Who could be.
        members: String,
    },
    /// The members cannot decide anything now, this removal included.
    #[error(
        "etcd has {healthy} healthy of {members} members; quorum needs {quorum}, so no member can be removed before another is back"
    )]
    Lost {
        /// Healthy members.
        healthy: usize,
        /// All members.
        members: usize,
        /// Members it takes to decide.
        quorum: usize,
    },
    /// Too few would be left to decide anything.
    #[error("removing {name} would leave {healthy} healthy of {members} etcd members; quorum needs {quorum}")]
    WouldBeLost {
        /// Who was to be removed.
        name: String,
        /// Healthy members without it.
        healthy: usize,
        /// Members without it.
        members: usize,
        /// Members it would then take to decide.
        quorum: usize,
    },
    /// The only one: the data would go with it.
    #[error("{name} is the only etcd member; removing it would delete the cluster's state")]
    Last {
        /// Who was to be removed.
        name: String,
    },
}

/// Members that it takes to decide, of `members`.
pub const fn quorum(members: usize) -> usize {
    members / 2 + 1
}

/// Members of `members` that may fail at once while the others still decide.
pub const fn tolerated_failures(members: usize) -> usize {
    members.saturating_sub(1) / 2
}

/// Whether `name` may leave: the members can decide so now, and those left can decide afterwards.
///
/// # Errors
///
/// Why not, with the figures.
pub fn check_removal(members: &[Member], name: &str) -> Result<(), QuorumError> {
    let Some(leaving) = members.iter().find(|member| member.name == name) else {
        let members = members
            .iter()
            .map(|member| member.name.as_str())
            .collect::<Vec<_>>()
            .join(", ");
        return Err(QuorumError::Unknown {
            name: name.to_owned(),
            members,
        });
    };
    let healthy = members.iter().filter(|member| member.healthy).count();
    let left = members.len() - 1;
    let healthy_left = healthy - usize::from(leaving.healthy);
    if left == 0 {
        return Err(QuorumError::Last { name: name.to_owned() });
    }
    if healthy < quorum(members.len()) {
        return Err(QuorumError::Lost {
            healthy,
            members: members.len(),
            quorum: quorum(members.len()),
        });
    }
    if healthy_left < quorum(left) {
        let name = name.to_owned();
        return Err(QuorumError::WouldBeLost {
            name,
            healthy: healthy_left,
            members: left,
            quorum: quorum(left),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quorum_is_more_than_half() {
        for (members, needed, tolerated) in [(1, 1, 0), (2, 2, 0), (3, 2, 1), (4, 3, 1), (5, 3, 2), (7, 4, 3)] {
            assert_eq!(
                (quorum(members), tolerated_failures(members)),
                (needed, tolerated),
                "{members} members"
            );
        }
    }

    #[test]
    fn a_healthy_member_leaves_only_if_the_others_keep_quorum() {
        assert_eq!(check_removal(&members("+++"), "cp-1"), Ok(()));
        assert_eq!(check_removal(&members("++"), "cp-2"), Ok(()));
        assert_eq!(
            refusal("++-", "cp-2"),
            "removing cp-2 would leave 1 healthy of 2 etcd members; quorum needs 2"
        );
        assert_eq!(
            refusal("+++--", "cp-1"),
            "removing cp-1 would leave 2 healthy of 4 etcd members; quorum needs 3"
        );
    }

    #[test]
    fn a_dead_member_leaves_while_the_others_have_quorum() {
        assert_eq!(check_removal(&members("++-"), "cp-3"), Ok(()));
        assert_eq!(check_removal(&members("+++--"), "cp-5"), Ok(()));
    }

    #[test]
    fn without_quorum_nobody_leaves() {
        let lost =
            "etcd has 1 healthy of 2 members; quorum needs 2, so no member can be removed before another is back";
        assert_eq!(refusal("+-", "cp-2"), lost);
        assert!(refusal("+--", "cp-3").starts_with("etcd has 1 healthy of 3 members; quorum needs 2"));
    }

    #[test]
    fn the_last_member_and_strangers_are_refused() {
        assert_eq!(
            refusal("+", "cp-1"),
            "cp-1 is the only etcd member; removing it would delete the cluster's state"
        );
        assert_eq!(refusal("++", "cp-9"), "cp-9 is no etcd member; members are cp-1, cp-2");
    }

    #[test]
    fn whatever_may_leave_leaves_a_quorum_behind() {
        for count in 1..=7_usize {
            for alive in 0..1_u32 << count {
                let members: Vec<Member> = (0..count).map(|i| member(i, alive >> i & 1 == 1)).collect();
                for leaving in &members {
                    if check_removal(&members, &leaving.name).is_ok() {
                        let left: Vec<_> = members.iter().filter(|member| *member != leaving).collect();
                        let healthy = left.iter().filter(|member| member.healthy).count();
                        assert!(healthy >= quorum(left.len()), "{members:?} without {}", leaving.name);
                    }
                }
            }
        }
    }

    /// `+` is a healthy member, `-` one that is not: cp-1, cp-2, ...
    fn members(health: &str) -> Vec<Member> {
        health
            .chars()
            .enumerate()
            .map(|(i, sign)| member(i, sign == '+'))
            .collect()
    }

    fn member(index: usize, healthy: bool) -> Member {
        Member {
            name: format!("cp-{}", index + 1),
            healthy,
        }
    }

    fn refusal(health: &str, name: &str) -> String {
        check_removal(&members(health), name)
            .expect_err("it must stay")
            .to_string()
    }
}
