//! Finding what somebody named on the command line.

use anyhow::bail;

use crate::store::Store;
use crate::store::accounts::OwnerRef;
use crate::store::messages::MessageRecord;
use crate::token::{Address, IdRef, Owner, Token};

/// The one owner with this key, id, short id or address.
///
/// # Errors
/// When there is none, or more than one; then the error lists them.
pub async fn owner<S: Store>(store: &S, text: &str) -> anyhow::Result<Owner> {
    let mut references = vec![OwnerRef::Key(text.to_owned())];
    references.extend(IdRef::parse(text).map(OwnerRef::Id));
    if text.contains('@') {
        references.extend(Address::parse(text).ok().map(OwnerRef::Address));
    }
    let mut found: Vec<Owner> = Vec::new();
    for reference in &references {
        for owner in store.find_owners(reference).await? {
            if found.iter().all(|known| known.id != owner.id) {
                found.push(owner);
            }
        }
    }
    match found.len() {
        0 => match nearest(text, store.keys_near(text).await?) {
            Some(key) => bail!("there is no owner {text:?}; did you mean {key}?"),
            None => bail!("there is no owner {text:?}; name one by its key, its id, or the address of a contact"),
        },
        1 => Ok(found.remove(0)),
        _ => {
            let lines: Vec<String> =
                found.iter().map(|owner| format!("  {}  {}  {}", owner.id.short(), owner.key, owner.name)).collect();
            bail!("{text:?} fits more than one owner; use a key or an id:\n{}", lines.join("\n"))
        }
    }
}

/// The key that somebody may have meant.
fn nearest(text: &str, keys: Vec<String>) -> Option<String> {
    let wanted = text.to_lowercase();
    let score = |key: &str| strsim::normalized_damerau_levenshtein(&wanted, &key.to_lowercase());
    let scored = keys.into_iter().map(|key| (score(&key), key)).filter(|(score, _)| *score >= 0.6);
    // Of several that are as near, the same one each time.
    scored.max_by(|a, b| a.0.total_cmp(&b.0).then_with(|| b.1.cmp(&a.1))).map(|(_, key)| key)
}

/// The one token with this id or short id.
///
/// # Errors
/// When there is none, or more than one; then the error lists them.
pub async fn token<S: Store>(store: &S, text: &str) -> anyhow::Result<Token> {
    let Some(id) = IdRef::parse(text) else {
        bail!("{text:?} is not a token's id: use the id, or its last digits as `lapsed token list` prints them")
    };
    let mut found = store.find_tokens(&id).await?;
    match found.len() {
        0 => bail!("there is no token {text}; `lapsed token list` prints those that there are"),
        1 => Ok(found.remove(0)),
        _ => {
            let lines: Vec<String> =
                found.iter().map(|token| format!("  {}  {}  {}", token.id, token.status, token.description)).collect();
            bail!("{text} fits more than one token; use the whole id:\n{}", lines.join("\n"))
        }
    }
}

/// The one message with this id or short id.
///
/// # Errors
/// When there is none, or more than one; then the error lists them.
pub async fn message<S: Store>(store: &S, text: &str) -> anyhow::Result<MessageRecord> {
    let Some(id) = IdRef::parse(text) else {
        bail!("{text:?} is not a message's id: use the id, or its last digits as `lapsed outbox list` prints them")
    };
    let mut found = store.find_messages(&id).await?;
    match found.len() {
        0 => bail!("there is no message {text}; `lapsed outbox list --all` prints those that there are"),
        1 => Ok(found.remove(0)),
        _ => {
            let lines: Vec<String> =
                found.iter().map(|message| format!("  {}  {}", message.id, message.state)).collect();
            bail!("{text} fits more than one message; use the whole id:\n{}", lines.join("\n"))
        }
    }
}

/// The owner of a token.
///
/// # Errors
/// When the store fails.
pub async fn owner_of<S: Store>(store: &S, token: &Token) -> anyhow::Result<Owner> {
    let found = store.find_owners(&OwnerRef::Id(IdRef::Whole(token.owner.uuid()))).await?;
    found.into_iter().next().ok_or_else(|| anyhow::anyhow!("the owner of token {} is gone", token.id))
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn only_a_key_that_is_near_is_suggested() {
        let keys = || ["alice", "Alina", "platform-team", "bob"].map(str::to_owned).to_vec();
        for (text, meant) in [
            ("alcie", Some("alice")),
            ("ALICE", Some("alice")),
            ("plattform-team", Some("platform-team")),
            ("bo", Some("bob")),
            ("carol", None),
            ("", None),
        ] {
            assert_eq!(nearest(text, keys()).as_deref(), meant, "{text:?}");
        }
    }
}
