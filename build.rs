//! Rebuilds when a migration, a template or the default configuration changes: all three are embedded in the binary.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
    println!("cargo:rerun-if-changed=config");
}
