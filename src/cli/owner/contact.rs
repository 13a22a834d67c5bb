//! `lapsed owner contact`

use chrono_tz::Tz;
use clap::Args;

use crate::cli::listing::{Fields, FormatArg, Listing};
use crate::cli::{Outcome, listing, lookup, output};
use crate::clock::Clock;
use crate::store::Store;
use crate::store::accounts::{NewContact, OwnerRef};
use crate::token::{Address, Contact, text};

/// `lapsed owner contact add`
#[derive(Debug, Args)]
pub struct Add {
    /// Whose contact: an owner's key or id, or the address of another contact
    owner: String,
    /// The address; one that exists already speaks for this owner, too
    #[arg(value_name = "ADDR", value_parser = Address::parse)]
    address: Address,
    /// A zone for this contact's mails, whichever owner they are about, in the place of the owner's
    #[arg(long, value_name = "ZONE", value_parser = text::time_zone)]
    time_zone: Option<Tz>,
    /// A language for this contact's mails, whichever owner they are about, in the place of the owner's
    #[arg(long, value_name = "TAG", value_parser = text::locale)]
    locale: Option<String>,
}

impl Add {
    pub(in crate::cli) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        let owner = lookup::owner(store, &self.owner).await?;
        let contact = NewContact { address: self.address, time_zone: self.time_zone, locale: self.locale };
        store.link_contact(owner.id, &contact, clock.now()).await?;
        let mut rows = vec![("owner", owner.key), ("contact", contact.address.to_string())];
        rows.extend(contact.time_zone.map(|zone| ("time zone", zone.name().to_owned())));
        rows.extend(contact.locale.clone().map(|locale| ("locale", locale)));
        output::print(&output::facts(&rows))?;
        if rows.len() > 2 {
            let owners = store.find_owners(&OwnerRef::Address(contact.address)).await?.len();
            if owners > 1 {
                output::say(&format!(
                    "This address speaks for {owners} owners, and this holds for its mails about each."
                ));
            }
        }
        Ok(())
    }
}

/// `lapsed owner contact remove`
#[derive(Debug, Args)]
pub struct Remove {
    /// Whose contact: an owner's key or id
    owner: String,
    /// The address, which goes on speaking for other owners
    #[arg(value_name = "ADDR", value_parser = Address::parse)]
    address: Address,
}

impl Remove {
    pub(in crate::cli) async fn run<S: Store>(self, store: &S) -> Outcome {
        let owner = lookup::owner(store, &self.owner).await?;
        let contacts = store.contacts_of(owner.id).await?;
        let Some(contact) = contacts.iter().find(|contact| contact.address == self.address) else {
            let problem = format!(
                "{} does not speak for {}; `lapsed owner contact list {}` tells who does",
                self.address, owner.key, owner.key
            );
            return Err(anyhow::anyhow!(problem).into());
        };
        store.unlink_contact(owner.id, contact.id).await?;
        output::print(&output::facts(&[("owner", owner.key.clone()), ("removed", self.address.to_string())]))?;
        if contacts.len() == 1 {
            output::say(&format!("{} has no contact left: nobody can be told of its deadlines.", owner.key));
        }
        Ok(())
    }
}

/// `lapsed owner contact unsuppress`
#[derive(Debug, Args)]
pub struct Unsuppress {
    /// The address
    #[arg(value_name = "ADDR", value_parser = Address::parse)]
    address: Address,
}

impl Unsuppress {
    pub(in crate::cli) async fn run<S: Store>(self, store: &S) -> Outcome {
        let Some(contact) = store.find_contact(&self.address).await? else {
            return Err(anyhow::anyhow!("{} is not a contact of any owner", self.address).into());
        };
        if contact.suppressed.is_none() {
            output::say(&format!("{} was not suppressed: it gets mail.", self.address));
            return Ok(());
        }
        store.unsuppress(contact.id).await?;
        output::print(&output::facts(&[
            ("contact", self.address.to_string()),
            ("was suppressed", suppressed(&contact, Tz::UTC)),
        ]))?;
        output::say(&format!(
            "It gets mail again. What failed meanwhile stays so: `lapsed outbox list --state failed --to {}` shows it, \
             `lapsed outbox retry` sends what is still true.",
            self.address
        ));
        Ok(())
    }
}

/// `lapsed owner contact list`
#[derive(Debug, Args)]
pub struct List {
    /// Whose contacts: an owner's key or id, or the address of a contact
    owner: String,
    #[command(flatten)]
    format: FormatArg,
}

impl List {
    pub(in crate::cli) async fn run<S: Store>(self, store: &S) -> Outcome {
        let owner = lookup::owner(store, &self.owner).await?;
        let mut listing = Listing::new(self.format, &["ADDRESS", "TIME ZONE", "LOCALE", "SUPPRESSED"], &FIELDS)?;
        for contact in store.contacts_of(owner.id).await? {
            listing.row(|| fields(&contact), || cells(&contact, owner.time_zone))?;
        }
        listing.end(&format!("{} has no contact: nobody can be told of its deadlines.", owner.key))?;
        Ok(())
    }
}

/// The names of [`fields`].
const FIELDS: [&str; 6] = ["id", "address", "time_zone", "locale", "suppressed_at", "suppressed_why"];

fn fields(contact: &Contact) -> Fields {
    let suppressed = contact.suppressed.as_ref();
    vec![
        ("id", contact.id.to_string().into()),
        ("address", contact.address.as_str().into()),
        ("time_zone", contact.time_zone.map(|zone| zone.name()).into()),
        ("locale", contact.locale.clone().into()),
        ("suppressed_at", listing::instant(suppressed.map(|suppressed| suppressed.at))),
        ("suppressed_why", suppressed.map(|suppressed| suppressed.why.clone()).into()),
    ]
}

fn cells(contact: &Contact, zone: Tz) -> Vec<String> {
    let own_zone = contact.time_zone.map(|zone| zone.name().to_owned());
    let locale = contact.locale.clone();
    let or_owners = |text: Option<String>| text.unwrap_or_else(|| "the owner's".into());
    vec![contact.address.to_string(), or_owners(own_zone), or_owners(locale), suppressed(contact, zone)]
}

fn suppressed(contact: &Contact, zone: Tz) -> String {
    let Some(suppressed) = &contact.suppressed else { return String::new() };
    format!("since {}: {}", output::instant(suppressed.at, zone), suppressed.why)
}

/// A contact in one line.
pub(super) fn described(contact: &Contact, zone: Tz) -> String {
    let suppressed = suppressed(contact, zone);
    let gets_nothing = if suppressed.is_empty() { String::new() } else { format!(", gets no mail {suppressed}") };
    format!("{}{gets_nothing}", contact.address)
}
