//! `lapsed`: the expiry daemon for API tokens.
