//! Mails that came back, on SQLite.

use uuid::Uuid;

use super::ledger::write_reminders;
use super::{Sqlite, contact};
use crate::clock::Timestamp;
use crate::policy::Reason;
use crate::store::Result;
use crate::store::bounces::{Bounces, Posted, bounce_operations};
use crate::store::outbox::{ClaimedReminder, FALLBACK};
use crate::store::planning::NewReminder;
use crate::store::row::{self, At, CarriedRow};
use crate::token::{Bucket, ContactId, MessageId, SYSTEM_OWNER_KEY};

bounce_operations!(Sqlite);
