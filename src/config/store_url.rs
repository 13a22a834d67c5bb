//! The store's URL, which may hold a password.
//!
//! Guarantees that neither `Debug` nor `Display` prints the password: only [`StoreUrl::expose`] does. The mask is
//! generous: where a URL is malformed, it hides too much rather than too little.

use std::fmt;

use sqlx::postgres::PgConnectOptions;

/// What stands in a message where a password would.
const MASK: &str = "***";

/// A URL that one of our back ends understands: `sqlite:`, `postgres://` or `postgresql://`.
#[derive(Clone, PartialEq, Eq)]
pub struct StoreUrl(String);

impl StoreUrl {
    /// Checks that the URL can name a store; whether it does is seen by connecting.
    ///
    /// # Errors
    /// A sentence that names the schemes, without the URL.
    pub fn parse(text: &str) -> Result<Self, String> {
        let known = ["sqlite:", "postgres://", "postgresql://"];
        let text = text.trim();
        match known.iter().find_map(|scheme| text.strip_prefix(scheme)) {
            Some("") => Err("names no database after the scheme".to_owned()),
            Some(file) if text.starts_with("sqlite:") && (file.contains(":memory:") || file.contains('?')) => {
                Err("must name a file and nothing else, such as sqlite:/var/lib/lapsed/lapsed.db".to_owned())
            }
            Some(_) if text.starts_with("postgres") && text.parse::<PgConnectOptions>().is_err() => {
                Err("cannot be read; write postgres://USER:PASSWORD@HOST:PORT/DATABASE".to_owned())
            }
            Some(_) => Ok(Self(text.to_owned())),
            None => Err("must begin with sqlite:, postgres:// or postgresql://".to_owned()),
        }
    }

    /// The URL with its password, for connecting. Never log it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&masked_url(&self.0))
    }
}

impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoreUrl({self})")
    }
}

/// `text` with the password of its authority (`user:password@host`) and of its parameters (`?password=...`) masked.
///
/// `text` is taken for a URL, however malformed: the authority begins after `//`, or after the first `:`, or at once,
/// and ends at the *last* `@`, because people forget to escape an `@` in a password. Where that `@` may just as well
/// belong to a parameter, everything after the user is masked.
pub(super) fn masked_url(text: &str) -> String {
    let start = text.find("//").map(|at| at + 2).or_else(|| text.find(':').map(|at| at + 1)).unwrap_or(0);
    let (scheme, rest) = text.split_at(start);
    let masked = match rest.rsplit_once('@') {
        None => masked_parameters(rest),
        Some((account, host)) => {
            let host = masked_parameters(host);
            let shown_account = masked_parameters(account);
            match account.split_once(':') {
                Some((user, _)) if shown_account != account => {
                    format!("{}:{MASK}", masked_parameters(user))
                }
                Some((user, _)) => format!("{user}:{MASK}@{host}"),
                None if shown_account != account => masked_parameters(rest),
                None if text.contains("://") => format!("{account}@{host}"),
                // So far from a URL that the account may hold a password all the same.
                None => format!("{MASK}@{host}"),
            }
        }
    };
    format!("{scheme}{masked}")
}

/// `text` with the value of each parameter whose name speaks of a password masked.
fn masked_parameters(text: &str) -> String {
    let Some((before, query)) = text.split_once('?') else {
        return text.to_owned();
    };
    let parameters: Vec<String> = query
        .split('&')
        .map(|parameter| match parameter.split_once('=') {
            Some((name, _)) if name.to_ascii_lowercase().contains("pass") => {
                format!("{name}={MASK}")
            }
            _ => parameter.to_owned(),
        })
        .collect();
    format!("{before}?{}", parameters.join("&"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn three_schemes_are_known() {
        for text in ["sqlite:lapsed.db", "sqlite:///var/lib/x.db", "postgres://u:p@h/db", "postgresql:///db"] {
            assert_eq!(StoreUrl::parse(text).unwrap().expose(), text);
        }
        for text in ["", "mysql://h/db", "postgres:h", "lapsed.db", "Sqlite:x"] {
            let error = StoreUrl::parse(text).unwrap_err();
            assert!(error.contains("sqlite:, postgres:// or postgresql://"), "{text:?}: {error}");
        }
        for text in
            ["sqlite:", "sqlite::memory:", "sqlite:x.db?mode=ro", "postgres://", "postgres://u:geheim@h:port/db"]
        {
            let error = StoreUrl::parse(text).unwrap_err();
            assert!(!error.contains("geheim"), "{error}");
        }
    }

    #[test]
    fn passwords_are_masked() {
        for (url, shown) in [
            ("postgres://u:geheim@h:5432/db", "postgres://u:***@h:5432/db"),
            ("postgres://u:ge@he:im@h/db?sslmode=require", "postgres://u:***@h/db?sslmode=require"),
            ("postgres://u@h/db?password=geheim&x=1", "postgres://u@h/db?password=***&x=1"),
            ("postgres:///db?x=1&PASSWORD=geheim", "postgres:///db?x=1&PASSWORD=***"),
            ("postgres://u@h/db?password=ge:he@im", "postgres://u@h/db?password=***:***"),
            ("postgres:u:geheim@h/db", "postgres:u:***@h/db"),
            ("u:geheim@h/db", "u:***@h/db"),
            ("postgres/u/geheim@h/db", "***@h/db"),
            ("sqlite:lapsed.db", "sqlite:lapsed.db"),
        ] {
            assert_eq!(masked_url(url), shown);
        }
    }

    proptest! {
        #[test]
        fn no_password_parameter_is_printed(password in "[a-z@:/?#=]*geheim[a-z@:/?#=]*") {
            for start in ["postgres://h:5432/db?", "postgres://u:p@h/db?user=u&", "postgres:///?"] {
                let printed = masked_url(&format!("{start}password={password}"));
                prop_assert!(!printed.contains("geheim"), "{}", printed);
            }
        }

        #[test]
        fn no_password_is_printed(password in "([a-z@:/?#&=]|pass=)*geheim([a-z@:/?#&=]|pass=)*") {
            let text = format!("postgres://user:{password}@host/db");
            let printed = match StoreUrl::parse(&text) {
                Ok(url) => format!("{url} {url:?}"),
                Err(error) => format!("{} {error}", masked_url(&text)),
            };
            prop_assert!(!printed.contains("geheim"), "{}", printed);
        }
    }
}
