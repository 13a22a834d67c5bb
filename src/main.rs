//! The `lapsed` program.

use std::process::ExitCode;

use clap::Parser;
use lapsed::cli;

fn main() -> ExitCode {
    cli::main(cli::Arguments::parse())
}
