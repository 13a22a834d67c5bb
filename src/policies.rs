//! Policies for groups of tokens: which tokens a policy is for, and which one a token follows.
//!
//! Pure. The first policy whose match fits counts; a token that fits none follows the one for all. A change of the policies is
//! known by their [`fingerprint`], whatever process made it.

use std::borrow::Cow;
use std::fmt;

use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::policy::Policy;
use crate::token::{Address, ContactId, Kind, Token};

/// A glob: `*` is any text, `?` any character, `[a-z]` one of these, `{a,b}` one of these texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    any_case: bool,
    /// One of them fits.
    globs: Vec<glob::Pattern>,
}

/// How many globs a pattern may stand for.
const MOST_GLOBS: usize = 100;

impl Pattern {
    /// Reads a pattern; `any_case` where upper and lower case are the same.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub fn parse(text: &str, any_case: bool) -> Result<Self, String> {
        let wrong = |problem: &str| format!("is no pattern: {problem}; * stands for any text");
        let globs = alternatives(&folded(text, any_case)).map_err(wrong)?;
        // What glob means by two asterisks is about files.
        let glob = |text: &String| glob::Pattern::new(&without_repeats(text)).map_err(|error| wrong(error.msg));
        Ok(Self { text: text.to_owned(), any_case, globs: globs.iter().map(glob).collect::<Result<_, _>>()? })
    }

    fn fits(&self, text: &str) -> bool {
        let text = folded(text, self.any_case);
        self.globs.iter().any(|glob| glob.matches(&text))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The text as it is compared.
fn folded(text: &str, any_case: bool) -> Cow<'_, str> {
    if any_case { text.to_lowercase().into() } else { text.into() }
}

/// The texts that a pattern with `{a,b}` stands for.
fn alternatives(text: &str) -> Result<Vec<String>, &'static str> {
    let mut all = vec![String::new()];
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        let (before, from) = rest.split_at(at);
        let inside = from.strip_prefix('{').ok_or("} without {")?;
        let (inside, after) = inside.split_once('}').ok_or("{ without }")?;
        if inside.contains('{') {
            return Err("{ within {");
        }
        let each =
            |so_far: &String| inside.split(',').map(move |one| format!("{so_far}{before}{one}")).collect::<Vec<_>>();
        all = all.iter().flat_map(each).collect();
        if all.len() > MOST_GLOBS {
            return Err("{ } for more than 100 texts");
        }
        rest = after;
    }
    all.iter_mut().for_each(|text| text.push_str(rest));
    Ok(all)
}

/// Several asterisks mean what one does.
fn without_repeats(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    for c in text.chars() {
        if c != '*' || !result.ends_with('*') {
            result.push(c);
        }
    }
    result
}

/// What a token is matched by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traits {
    /// Primary or additional.
    pub kind: Kind,
    /// What it may be used for.
    pub scopes: Vec<String>,
    /// Whose it is.
    pub owner_key: String,
    /// What it is for.
    pub description: String,
}

impl Traits {
    /// Of a token, and its owner's key.
    pub fn of(token: &Token, owner_key: &str) -> Self {
        Self {
            kind: token.kind,
            scopes: token.scopes.clone(),
            owner_key: owner_key.to_owned(),
            description: token.description.clone(),
        }
    }
}

/// Which tokens a policy is for: those that fit all that is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// Of this kind.
    pub kind: Option<Kind>,
    /// With such a scope.
    pub scope: Option<Pattern>,
    /// Of an owner with such a key.
    pub owner: Option<Pattern>,
    /// With such a description, in upper or lower case.
    pub description: Option<Pattern>,
}

impl Match {
    /// Whether a token is one of these.
    ///
    /// ```
    /// use lapsed::policies::{Match, Pattern, Traits};
    /// use lapsed::token::Kind;
    /// let token = Traits {
    ///     kind: Kind::Additional,
    ///     scopes: vec!["repo:read".into(), "deploy:prod".into()],
    ///     owner_key: "ci-bot".into(),
    ///     description: "Release upload (CI)".into(),
    /// };
    /// let glob = |text, any_case| Some(Pattern::parse(text, any_case).unwrap());
    /// assert!(Match { scope: glob("deploy:*", false), ..Match::default() }.fits(&token));
    /// assert!(Match { owner: glob("{ci,cd}-*", false), description: glob("*(ci)", true), ..Match::default() }.fits(&token));
    /// assert!(!Match { kind: Some(Kind::Primary), scope: glob("*", false), ..Match::default() }.fits(&token));
    /// ```
    pub fn fits(&self, token: &Traits) -> bool {
        let fits = |pattern: &Option<Pattern>, text: &str| pattern.as_ref().is_none_or(|pattern| pattern.fits(text));
        let scope = |pattern: &Pattern| token.scopes.iter().any(|scope| pattern.fits(scope));
        self.kind.is_none_or(|kind| kind == token.kind)
            && self.scope.as_ref().is_none_or(scope)
            && fits(&self.owner, &token.owner_key)
            && fits(&self.description, &token.description)
    }
}

impl fmt::Display for Match {
    /// As the configuration has it: `kind = "additional", owner = "ci-*"`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |name: &str, value: Option<String>| value.map(|value| format!("{name} = {value:?}"));
        let pattern = |name, pattern: &Option<Pattern>| text(name, pattern.as_ref().map(ToString::to_string));
        let parts = [
            text("kind", self.kind.map(|kind| kind.to_string())),
            pattern("scope", &self.scope),
            pattern("owner", &self.owner),
            pattern("description", &self.description),
        ];
        f.write_str(&parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

/// A policy for a group of tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Which tokens.
    pub matches: Match,
    /// Which reminders they owe.
    pub policy: Policy,
    /// When messages about them may go.
    pub digest: Digest,
    /// Who is told besides those who are told anyway.
    pub contacts: Vec<(ContactId, Address)>,
}

/// The policy that a token follows, and its place among the policies; `None`: the one for all tokens.
pub fn group_of<'a>(groups: &'a [Group], token: &Traits) -> Option<(usize, &'a Group)> {
    groups.iter().enumerate().find(|(_, group)| group.matches.fits(token))
}

/// The same for the same policies, and another for others, in every process: a hash of all that says which reminders are owed
/// to whom. `None` where there is one policy for all tokens: its leads are known by their watermarks.
pub fn fingerprint(all: &Policy, groups: &[Group]) -> Option<String> {
    if groups.is_empty() {
        return None;
    }
    let mut text = leads(all);
    for group in groups {
        let contacts: Vec<&str> = group.contacts.iter().map(|(_, address)| address.as_str()).collect();
        text += &format!("\n{}: {} {}", group.matches, leads(&group.policy), contacts.join(" "));
    }
    let hash = Sha256::digest(text.as_bytes());
    Some(hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect())
}

fn leads(policy: &Policy) -> String {
    policy.leads().iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;
    use proptest::prelude::*;

    use super::*;
    use crate::policy::Lead;

    fn policy(days: &[i64]) -> Policy {
        Policy::new(days.iter().map(|days| Lead::new(TimeDelta::days(*days))), true, TimeDelta::days(7))
    }

    fn group(owner: &str, days: &[i64]) -> Group {
        Group {
            matches: Match { owner: Some(Pattern::parse(owner, false).expect(owner)), ..Match::default() },
            policy: policy(days),
            digest: Digest::holding(TimeDelta::zero()),
            contacts: Vec::new(),
        }
    }

    fn token(owner: &str) -> Traits {
        Traits {
            kind: Kind::Additional,
            scopes: Vec::new(),
            owner_key: owner.to_owned(),
            description: "deploy key, nightly/weekly".to_owned(),
        }
    }

    #[test]
    fn the_first_that_fits_counts() {
        let groups = [group("ci-*", &[14]), group("*-bot", &[3]), group("ci-b*", &[1])];
        let place = |owner: &str| group_of(&groups, &token(owner)).map(|(place, _)| place);
        assert_eq!([place("ci-bot"), place("bug-bot"), place("alice")], [Some(0), Some(1), None]);
    }

    #[test]
    fn a_token_without_scopes_has_none_that_fits() {
        let any = Match { scope: Some(Pattern::parse("*", false).expect("a pattern")), ..Match::default() };
        assert!(!any.fits(&token("alice")));
        assert!(Match::default().fits(&token("alice")));
    }

    #[test]
    fn a_star_is_any_text() {
        let fits = |pattern: &str| Pattern::parse(pattern, true).expect(pattern).fits("Deploy key, nightly/weekly");
        assert!(
            fits("deploy*weekly") && fits("*NIGHTLY*") && fits("deploy key, nightly?weekly") && fits("{other,deploy*}")
        );
        assert!(!fits("deploy") && !fits("*nightly") && !fits("{other,another}*"));
        assert!(fits("**weekly") && fits("{d,x}eploy*{ly,x}") && fits("[a-e]eploy***"));
        assert!(Pattern::parse("SCHLÜSSEL*", true).expect("a pattern").fits("Schlüssel für CI"));
        for (text, why) in
            [("[a", "invalid range"), ("{a", "{ without }"), ("a}", "} without {"), ("{a,{b}}", "{ within {")]
        {
            let error = Pattern::parse(text, false).expect_err(text);
            assert!(error.contains("is no pattern") && error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn other_policies_have_another_fingerprint() {
        let all = policy(&[30, 7, 1]);
        let groups = [group("ci-*", &[14]), group("*-bot", &[3])];
        let print = fingerprint(&all, &groups);
        assert_eq!(fingerprint(&all, &[]), None);
        assert_eq!(fingerprint(&all, &groups.clone()), print);
        let mut others = vec![fingerprint(&policy(&[30, 7]), &groups), fingerprint(&all, &groups[..1])];
        others.push(fingerprint(&all, &[groups[1].clone(), groups[0].clone()]));
        others.push(fingerprint(&all, &[group("ci-*", &[14, 2]), groups[1].clone()]));
        others.push(fingerprint(&all, &[group("cd-*", &[14]), groups[1].clone()]));
        assert!(others.iter().all(|other| other.is_some() && *other != print));
        others.sort();
        others.dedup();
        assert_eq!(others.len(), 5);
        // When mail goes has no part in what is owed.
        let mut slower = groups.clone();
        slower[0].digest.hold = TimeDelta::days(1);
        assert_eq!(fingerprint(&all, &slower), print);
    }

    proptest! {
        #[test]
        fn no_pattern_and_no_text_breaks_it(pattern in "[a-c*?{},!\\[\\]\\\\/-]{0,12}", text in ".{0,40}") {
            if let Ok(pattern) = Pattern::parse(&pattern, true) {
                pattern.fits(&text);
            }
        }
    }
}
