//! What carries a mail: SMTP, files in a Maildir, or memory.
//!
//! One contract for all three. [`Transport::ready`] is called before a message is claimed, so that a server that cannot
//! be reached, or a disk that is full, touches no message. [`Transport::send`] asks whether the message is still ours
//! before it delivers, and may be dropped at any moment: what was under way is then lost or delivered, and the next message
//! starts afresh.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::token::MessageId;

use super::compose::Composed;
use super::maildir::{Maildir, MaildirError};
use super::outcome::{Happened, Phase};
use super::smtp::Smtp;

/// A way to deliver mail.
#[derive(Debug)]
pub enum Transport {
    /// Into a directory.
    Maildir(Maildir),
    /// To a mail server.
    Smtp(Box<Smtp>),
    /// Into memory, for tests and simulations.
    Memory(Memory),
}

impl Transport {
    /// Makes sure that mail can be delivered now: connects where that is needed.
    ///
    /// # Errors
    /// Why nobody's mail can be delivered, in a phase before any message was mentioned.
    pub async fn ready(&mut self) -> Result<(), Happened> {
        match self {
            Self::Maildir(maildir) => {
                let maildir = maildir.clone();
                blocking(move || maildir.create()).await
            }
            Self::Smtp(smtp) => smtp.ready().await,
            Self::Memory(memory) => memory.ready(),
        }
    }

    /// Whether the next message can be sent without making sure again.
    pub fn is_open(&self) -> bool {
        match self {
            Self::Smtp(smtp) => smtp.is_open(),
            Self::Maildir(_) | Self::Memory(_) => false,
        }
    }

    /// Delivers one message. `still_ours` says whether the message's lease is still held; when it says no, the message
    /// is not delivered.
    pub async fn send<F, Ours>(&mut self, id: MessageId, composed: &Composed, mut still_ours: F) -> Happened
    where
        F: FnMut() -> Ours,
        Ours: Future<Output = bool>,
    {
        match self {
            Self::Maildir(maildir) => {
                let (maildir, bytes) = (maildir.clone(), composed.bytes.clone());
                let written = match blocking(move || maildir.write(id, &bytes)).await {
                    Ok(written) => written,
                    Err(happened) => return happened,
                };
                if !still_ours().await {
                    return Happened::LostLease;
                }
                match blocking(move || written.deliver()).await {
                    Ok(path) => Happened::accepted(&format!("written to {}", path.display())),
                    Err(happened) => happened,
                }
            }
            Self::Smtp(smtp) => smtp.send(composed, still_ours).await,
            Self::Memory(memory) => {
                if still_ours().await {
                    memory.take(id, composed)
                } else {
                    Happened::LostLease
                }
            }
        }
    }

    /// Ends politely. The next message begins anew.
    pub async fn close(&mut self) {
        if let Self::Smtp(smtp) = self {
            smtp.close().await;
        }
    }
}

/// Does what blocks on a disk elsewhere.
async fn blocking<T, F>(work: F) -> Result<T, Happened>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, MaildirError> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(error) => Err(Happened::Broken { phase: Phase::Connect, error: error.to_string() }),
    }
}

/// Keeps mails in memory. Clones share one memory, so that a test can look while a daemon delivers.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    delivered: Vec<(MessageId, Composed)>,
    answers: VecDeque<Happened>,
    down: Option<Happened>,
}

impl Memory {
    /// An empty memory that takes everything.
    pub fn new() -> Self {
        Self::default()
    }

    /// What was delivered, in order. A message whose outcome was told to be unknown counts as delivered.
    pub fn delivered(&self) -> Vec<(MessageId, Composed)> {
        self.lock().delivered.clone()
    }

    /// Answers the next message that is not yet spoken for like this, instead of taking it.
    pub fn answer(&self, happened: Happened) {
        self.lock().answers.push_back(happened);
    }

    /// Fails to be ready like this until told otherwise.
    pub fn set_down(&self, why: Option<Happened>) {
        self.lock().down = why;
    }

    fn ready(&self) -> Result<(), Happened> {
        self.lock().down.clone().map_or(Ok(()), Err)
    }

    fn take(&self, id: MessageId, composed: &Composed) -> Happened {
        let mut shared = self.lock();
        if let Some(why) = &shared.down {
            return why.clone();
        }
        let answer = shared.answers.pop_front().unwrap_or_else(|| Happened::accepted("kept in memory"));
        if matches!(answer, Happened::Accepted { .. } | Happened::Unknown { .. }) {
            shared.delivered.push((id, composed.clone()));
        }
        answer
    }

    /// A panic elsewhere leaves nothing half-done here.
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::token::Bucket;

    fn composed() -> Composed {
        Composed {
            from: "lapsed@example.org".parse().expect("an address"),
            to: "ann@example.org".parse().expect("an address"),
            subject: "x".into(),
            bytes: b"Subject: x\r\n\r\ny\r\n".to_vec(),
        }
    }

    fn id() -> MessageId {
        MessageId::new(Bucket::from_number(7), DateTime::from_timestamp(1_800_000_000, 0).expect("in range"))
    }

    #[tokio::test]
    async fn a_maildir_takes_what_is_ours_and_nothing_else() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut transport = Transport::Maildir(Maildir::new(directory.path().join("mail")));
        transport.ready().await.expect("ready");
        assert_eq!(transport.send(id(), &composed(), || async { false }).await, Happened::LostLease);
        let files = |part: &str| std::fs::read_dir(directory.path().join("mail").join(part)).expect("there").count();
        assert_eq!((files("new"), files("tmp")), (0, 0));
        assert!(matches!(transport.send(id(), &composed(), || async { true }).await, Happened::Accepted { .. }));
        assert_eq!((files("new"), files("tmp")), (1, 0));
    }

    #[tokio::test]
    async fn a_maildir_that_is_gone_blames_no_message() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut transport = Transport::Maildir(Maildir::new(directory.path().join("mail")));
        let happened = transport.send(id(), &composed(), || async { true }).await;
        assert!(matches!(happened, Happened::Broken { phase: Phase::Connect, .. }), "{happened:?}");
    }

    #[tokio::test]
    async fn memory_does_as_it_is_told() {
        let memory = Memory::new();
        let mut transport = Transport::Memory(memory.clone());
        let refused = Happened::refused(Phase::Rcpt, 550, "5.1.1 no such user");
        memory.answer(refused.clone());
        memory.answer(Happened::Unknown { error: "reset".into() });
        assert_eq!(transport.send(id(), &composed(), || async { true }).await, refused);
        assert!(memory.delivered().is_empty());
        assert!(matches!(transport.send(id(), &composed(), || async { true }).await, Happened::Unknown { .. }));
        assert_eq!(memory.delivered().len(), 1);
        assert_eq!(transport.send(id(), &composed(), || async { false }).await, Happened::LostLease);
        assert!(matches!(transport.send(id(), &composed(), || async { true }).await, Happened::Accepted { .. }));
        assert_eq!(memory.delivered().len(), 2);

        let down = Happened::Broken { phase: Phase::Connect, error: "refused".into() };
        memory.set_down(Some(down.clone()));
        assert_eq!(transport.ready().await, Err(down));
        memory.set_down(None);
        assert_eq!(transport.ready().await, Ok(()));
    }

    /// The daemon delivers in spawned tasks, with a closure that borrows what it renews the lease with.
    #[tokio::test]
    async fn deliveries_can_be_spawned() {
        let lease = Arc::new(tokio::sync::Mutex::new(0));
        let renewed = Arc::clone(&lease);
        let task = tokio::spawn(async move {
            let mut transport = Transport::Memory(Memory::new());
            let mail = composed();
            let ours = || async {
                *lease.lock().await += 1;
                true
            };
            transport.send(id(), &mail, ours).await
        });
        assert!(matches!(task.await.expect("no panic"), Happened::Accepted { .. }));
        assert_eq!(*renewed.lock().await, 1);
    }
}
