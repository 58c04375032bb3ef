//! `edgectl`: asks and operates `edged` over its control socket. See `edgectl --help`.

fn main() -> std::process::ExitCode {
    appliance::cli::main()
}
