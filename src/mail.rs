//! Mail: what a message says, what carries it, and what a server's answer means.
//!
//! In the order in which a message goes through them:
//!
//! - [`letter`]: what one message has to say, and to whom. [`when`], [`clean`], [`wrap`], [`manage_url`]: instants in a
//!   calendar, strangers' texts made harmless, columns, links. [`view`]: what templates know of a letter. Pure.
//! - [`templates`]: how that is said in each language; an operator's own in the place of ours. [`sample`]: made-up letters.
//! - [`compose`]: from a letter to its bytes, with a calendar file. The same message has the same
//!   `Message-ID` at each attempt.
//! - [`transport`]: carries a composed mail, by [`smtp`], into a [`maildir`], or into memory. Guarantees that a server
//!   that cannot be reached is found out before a message is touched, that whoever lost a message's lease does not send
//!   it, and that a future that was dropped half-way leaves no session behind that could answer for the wrong message.
//! - [`outcome`]: one pure function from what happened to what now, and one for what is heard of it later.
//! - [`domain`]: whether a sender's domain takes what comes back.
//! - [`return_path`]: the address where a message's bounces come back to. [`dsn`]: reads them.
//!
//! Nothing here knows the store. A crash at any point leaves at worst a mail that the server took and nobody recorded: it
//! is sent again under the same `Message-ID`.

pub mod letter;
pub mod when;
pub mod clean;
pub mod wrap;
pub mod manage_url;
pub mod view;
pub mod sample;
pub mod templates;
mod calendar;
pub mod return_path;
pub mod compose;
pub mod dsn;
pub mod outcome;
pub mod maildir;
pub mod smtp;
pub mod domain;
pub mod transport;

pub use compose::{ComposeError, Composed, Composer};
pub use letter::{Item, Letter};
pub use outcome::{Happened, Next, Phase, decide};
pub use templates::{BadTemplates, Templates};
pub use transport::{Memory, Transport};
