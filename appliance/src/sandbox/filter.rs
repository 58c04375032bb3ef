//! The system calls each role may make. Everything else fails with EPERM.
//!
//! The lists are for x86_64 and aarch64. A call that is not restricted by its arguments costs nothing to speak of: the
//! kernel remembers it in a bitmap.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::worker::Role;

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

/// Calls that every role may make with any arguments.
const COMMON: &[c_long] = &[
    // Descriptors it was given.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_close,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_dup,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Waiting.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    // Memory without PROT_EXEC, which `restricted` sees to.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads and the process itself.
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getcpu,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_sysinfo,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// What the balancer makes on top: connections and datagrams out, pipes to splice through.
const LB: &[c_long] = &[
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_recvmmsg,
    libc::SYS_sendmmsg,
    libc::SYS_splice,
    libc::SYS_pipe2,
];

/// What the resolver makes on top: connections and datagrams out, many datagrams in by one call.
const DNS64: &[c_long] = &[libc::SYS_connect, libc::SYS_recvmmsg, libc::SYS_sendmmsg];

/// Installs the filters on this thread and those it starts.
pub(super) fn apply(role: Role) -> Result<(), seccompiler::Error> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    // glibc starts threads with clone3, whose flags no filter can see, and falls back to clone only if there is none.
    // A filter of its own, because one filter has one error; among several the strictest answer counts, so that the
    // other one may allow it.
    let no_clone3 = SeccompFilter::new(
        [(libc::SYS_clone3, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        arch,
    )?;
    let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let allowed = SeccompFilter::new(rules(role)?, refuse, SeccompAction::Allow, arch)?;
    for filter in [no_clone3, allowed] {
        let program: seccompiler::BpfProgram = filter.try_into()?;
        seccompiler::apply_filter(&program)?;
    }
    Ok(())
}

fn rules(role: Role) -> Result<Rules, BackendError> {
    let mut rules: Rules = COMMON.iter().map(|call| (*call, Vec::new())).collect();
    restricted(&mut rules)?;
    match role {
        Role::Lb => {
            rules.extend(LB.iter().map(|call| (*call, Vec::new())));
            rules.insert(libc::SYS_socket, internet_sockets()?);
        }
        Role::Dns64 => {
            rules.extend(DNS64.iter().map(|call| (*call, Vec::new())));
            rules.insert(libc::SYS_socket, internet_sockets()?);
        }
        // It reads and writes the descriptors that it was given.
        Role::Nat64 | Role::Web => {}
    }
    Ok(rules)
}

/// Calls that every role may make with certain arguments.
fn restricted(rules: &mut Rules) -> Result<(), BackendError> {
    let no_exec = || masked(2, libc::PROT_EXEC, 0);
    rules.insert(libc::SYS_mmap, vec![rule([no_exec()?])?]);
    rules.insert(libc::SYS_mprotect, vec![rule([no_exec()?])?]);

    let namespaces = libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWUTS;
    let thread = libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
    rules.insert(libc::SYS_clone, vec![rule([masked(0, namespaces | thread, thread)?])?]);

    // Only abort() of its own process: the first argument of both is the process.
    let own = rustix::process::getpid().as_raw_pid();
    rules.insert(libc::SYS_kill, one_of(0, &[own])?);
    rules.insert(libc::SYS_tgkill, one_of(0, &[own])?);
    rules.insert(libc::SYS_sched_setaffinity, one_of(0, &[0])?);
    // Reading its own limits, never setting them: the new value is a null pointer.
    rules.insert(libc::SYS_prlimit64, vec![rule([equal(0, 0)?, null(2)?])?]);
    // The names of threads and of memory regions.
    rules.insert(libc::SYS_prctl, one_of(0, &[libc::PR_SET_NAME, libc::PR_SET_VMA])?);

    // Not F_SETOWN and F_SETSIG, which make the kernel send signals.
    let commands = [
        libc::F_DUPFD_CLOEXEC,
        libc::F_GETFD,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_GETPIPE_SZ,
        libc::F_SETPIPE_SZ,
        libc::F_GET_SEALS,
    ];
    rules.insert(libc::SYS_fcntl, one_of(1, &commands)?);
    rules.insert(
        libc::SYS_ioctl,
        numbers(1, &[libc::FIONBIO, libc::FIONREAD, libc::FIOCLEX])?,
    );
    // How glibc asks about a descriptor: an empty path and this flag.
    rules.insert(libc::SYS_newfstatat, one_of(3, &[libc::AT_EMPTY_PATH])?);
    rules.insert(libc::SYS_setsockopt, socket_options()?);
    Ok(())
}

/// TCP and UDP over IPv4 and IPv6; not MPTCP or SMC, to which Landlock's TCP rules do not apply.
fn internet_sockets() -> Result<Vec<SeccompRule>, BackendError> {
    let mut allowed = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        for (kind, protocol) in [
            (libc::SOCK_STREAM, libc::IPPROTO_TCP),
            (libc::SOCK_DGRAM, libc::IPPROTO_UDP),
        ] {
            // The bits above the kind are flags such as SOCK_CLOEXEC.
            for protocol in [0, protocol] {
                allowed.push(rule([equal(0, family)?, masked(1, 0xf, kind)?, equal(2, protocol)?])?);
            }
        }
    }
    Ok(allowed)
}

/// Options of sockets, addresses and TCP; not those that load programs or other protocols into the kernel.
fn socket_options() -> Result<Vec<SeccompRule>, BackendError> {
    let programs = [
        libc::SO_ATTACH_FILTER,
        libc::SO_ATTACH_BPF,
        libc::SO_ATTACH_REUSEPORT_CBPF,
        libc::SO_ATTACH_REUSEPORT_EBPF,
    ];
    let mut socket = vec![equal(1, libc::SOL_SOCKET)?];
    for option in programs {
        socket.push(differs(2, option)?);
    }
    let mut tcp = vec![equal(1, libc::IPPROTO_TCP)?];
    for option in [libc::TCP_ULP, libc::TCP_REPAIR, libc::TCP_MD5SIG] {
        tcp.push(differs(2, option)?);
    }
    let mut allowed = vec![SeccompRule::new(socket)?, SeccompRule::new(tcp)?];
    // From 64 on these levels also hold the packet filter's tables.
    let below = |level| rule([equal(1, level)?, condition(2, SeccompCmpOp::Lt, 64)?]);
    allowed.push(below(libc::IPPROTO_IP)?);
    allowed.push(below(libc::IPPROTO_IPV6)?);
    allowed.push(rule([equal(1, libc::IPPROTO_IPV6)?, equal(2, libc::IPV6_TCLASS)?])?);
    Ok(allowed)
}

fn rule<const N: usize>(conditions: [SeccompCondition; N]) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(conditions.into())
}

/// One rule per value that `argument` may have.
fn one_of(argument: u8, values: &[i32]) -> Result<Vec<SeccompRule>, BackendError> {
    values.iter().map(|value| rule([equal(argument, *value)?])).collect()
}

/// As [`one_of`], for the requests of ioctl(2), which are unsigned.
fn numbers(argument: u8, values: &[libc::c_ulong]) -> Result<Vec<SeccompRule>, BackendError> {
    values
        .iter()
        .map(|value| rule([condition(argument, SeccompCmpOp::Eq, *value)?]))
        .collect()
}

fn equal(argument: u8, value: i32) -> Result<SeccompCondition, BackendError> {
    condition(argument, SeccompCmpOp::Eq, low(value))
}

fn differs(argument: u8, value: i32) -> Result<SeccompCondition, BackendError> {
    condition(argument, SeccompCmpOp::Ne, low(value))
}

fn masked(argument: u8, mask: i32, value: i32) -> Result<SeccompCondition, BackendError> {
    condition(argument, SeccompCmpOp::MaskedEq(low(mask)), low(value))
}

fn null(argument: u8) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
}

/// The 32 bits that the kernel looks at.
fn low(value: i32) -> u64 {
    u64::from(value.cast_unsigned())
}
