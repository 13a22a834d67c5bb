//! `lapsed config show`: what is in force, and where each value came from.

use std::path::Path;

use super::listing::{FormatArg, Listing};
use super::{Failure, Outcome};
use crate::config;

/// Prints every key with its value and its origin; passwords are masked.
pub(super) fn run(file: Option<&Path>, format: FormatArg) -> Outcome {
    let (_, values) = config::load_with_origins(file).map_err(|error| Failure::Usage(error.to_string()))?;
    let mut listing = Listing::new(format, &["KEY", "VALUE", "FROM"], &["key", "value", "from"])?;
    for value in values {
        let (key, text, value, origin) = (value.key, value.text, value.value, value.origin);
        let fields = || vec![("key", key.clone().into()), ("value", value.clone()), ("from", origin.clone().into())];
        listing.row(fields, || vec![key.clone(), text.clone(), origin.clone()])?;
    }
    listing.end("")?;
    Ok(())
}
