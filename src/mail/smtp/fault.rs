//! Why an exchange with a mail server did not succeed.

use std::error::Error as _;
use std::future::Future;
use std::time::Duration;

use lettre::transport::smtp::response::Response;
use tokio::time::timeout;

use crate::mail::outcome::{Happened, Phase};

/// Why an exchange with the server did not succeed.
pub(super) enum Fault {
    /// It answered 4xx or 5xx.
    Refused { code: u16, text: String },
    /// It is gone, or says what makes no sense.
    Broken(String),
    /// It says nothing.
    TimedOut(Duration),
}

impl Fault {
    pub(super) fn at(self, phase: Phase) -> Happened {
        match self {
            Self::Refused { code, text } => Happened::refused(phase, code, &text),
            Self::Broken(error) => broken(phase, &error),
            Self::TimedOut(limit) => broken(phase, &no_answer(limit)),
        }
    }

    /// Whether the server is still there and in step with us. 421 says that it is about to close (RFC 5321, section
    /// 3.8).
    pub(super) fn leaves_the_session_alive(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if *code != 421)
    }

    /// Whether this is how a session ends that the server closed while it was idle.
    pub(super) fn says_goodbye(&self) -> bool {
        matches!(self, Self::Broken(_) | Self::Refused { code: 421, .. })
    }
}

impl From<lettre::transport::smtp::Error> for Fault {
    fn from(error: lettre::transport::smtp::Error) -> Self {
        match error.status() {
            Some(code) => {
                Self::Refused { code: code.into(), text: error.source().map(ToString::to_string).unwrap_or_default() }
            }
            None => Self::Broken(error.to_string()),
        }
    }
}

pub(super) fn broken(phase: Phase, error: &str) -> Happened {
    Happened::Broken { phase, error: error.to_owned() }
}

pub(super) fn no_answer(limit: Duration) -> String {
    format!("no answer within {limit:?}")
}

/// Waits for an answer, but not for ever.
pub(super) async fn within<T, E: Into<Fault>>(
    limit: Duration,
    answer: impl Future<Output = Result<T, E>>,
) -> Result<T, Fault> {
    match timeout(limit, answer).await {
        Ok(answer) => answer.map_err(Into::into),
        Err(_) => Err(Fault::TimedOut(limit)),
    }
}

pub(super) fn unexpected(reply: &Response) -> String {
    format!("unexpected reply {} {}", reply.code(), reply.first_line().unwrap_or_default())
}
