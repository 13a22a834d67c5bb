//! How the databases carry out the statements that the store runs: captured while it runs them, not copied from it.
//!
//! PostgreSQL's `auto_explain` sends each plan as a notice, and sqlx hands notices to `tracing`; of SQLite the
//! statements themselves come through `tracing`, and are explained afterwards. Relies on one capture at a time.

use std::collections::BTreeSet;
use std::sync::{LazyLock, Mutex};

use serde_json::Value;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Row};
use tokio::sync::{RwLock, RwLockWriteGuard};
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, filter::LevelFilter};

use super::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};

static SEEN: Mutex<Vec<String>> = Mutex::new(Vec::new());
static ALONE: LazyLock<RwLock<()>> = LazyLock::new(|| {
    tracing_subscriber::registry().with(Listen.with_filter(LevelFilter::DEBUG)).init();
    RwLock::new(())
});

struct Listen;

impl<S: tracing::Subscriber> Layer<S> for Listen {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if matches!(event.metadata().target(), "sqlx::query" | "sqlx::postgres::notice") {
            event.record(&mut Text);
        }
    }
}

struct Text;

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        let told = matches!(field.name(), "message" | "summary" | "db.statement");
        if told && !value.is_empty() && !value.ends_with('…') {
            SEEN.lock().expect("no panic while it is held").push(value.trim().to_owned());
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

/// Does what nobody shall listen to: beside others of its kind, never beside a capture.
pub async fn unheard<T>(work: impl Future<Output = T>) -> T {
    let _shared = ALONE.read().await;
    work.await
}

/// Listens until it is dropped; the next one waits for that.
pub struct Capture {
    _alone: RwLockWriteGuard<'static, ()>,
}

impl Capture {
    pub async fn start() -> Self {
        let alone = ALONE.write().await;
        SEEN.lock().expect("no panic while it is held").clear();
        Self { _alone: alone }
    }

    /// What was told since the start, or the last call of this.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut *SEEN.lock().expect("no panic while it is held"))
    }
}

/// One way in which a statement reaches rows of a table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Access {
    /// The table, or what the statement calls it.
    pub table: String,
    /// The index, `PRIMARY KEY` on SQLite; `None`: the table is read from end to end.
    pub index: Option<String>,
    /// What is looked up in the index; empty: it is read from end to end.
    pub condition: String,
}

/// A statement and how it was carried out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Plan {
    pub sql: String,
    pub accesses: Vec<Access>,
    /// Whether it was compiled to machine code first.
    pub compiled: bool,
    /// The database's own words.
    pub text: String,
}

/// A back end that can be asked how it carries out statements.
pub trait Explains: Backend {
    /// Makes connections that are opened from now on tell their plans.
    fn explain_from_now_on(&self) -> impl Future<Output = ()>;

    /// The plans in what was captured.
    fn plans(&self, told: Vec<String>) -> impl Future<Output = Vec<Plan>>;
}

impl Explains for OnPostgres {
    async fn explain_from_now_on(&self) {
        let name = &self.database.name;
        self.execute(&format!(
            "ALTER DATABASE {name} SET session_preload_libraries = 'auto_explain'; \
             ALTER DATABASE {name} SET auto_explain.log_min_duration = 0; \
             ALTER DATABASE {name} SET auto_explain.log_analyze = on; \
             ALTER DATABASE {name} SET auto_explain.log_timing = off; \
             ALTER DATABASE {name} SET auto_explain.log_format = 'json'; \
             ALTER DATABASE {name} SET auto_explain.log_level = 'notice'; \
             ALTER DATABASE {name} SET jit_above_cost = 0"
        ))
        .await;
    }

    async fn plans(&self, told: Vec<String>) -> Vec<Plan> {
        let plans: BTreeSet<Plan> = told.iter().filter_map(|text| plan_of_notice(text)).collect();
        plans.into_iter().collect()
    }
}

impl Explains for OnPartitions {
    async fn explain_from_now_on(&self) {
        self.0.explain_from_now_on().await;
    }

    async fn plans(&self, told: Vec<String>) -> Vec<Plan> {
        self.0.plans(told).await
    }
}

fn plan_of_notice(text: &str) -> Option<Plan> {
    let json = text.strip_prefix("duration: ").map(|_| &text[text.find('{').unwrap_or(0)..])?;
    let root: Value = serde_json::from_str(json).expect("auto_explain tells JSON");
    let mut accesses = Vec::new();
    walk(&root["Plan"], "", &mut accesses);
    let sql = root["Query Text"].as_str().expect("auto_explain tells the statement").to_owned();
    Some(Plan { sql, accesses, compiled: !root["JIT"].is_null(), text: format!("{:#}", root["Plan"]) })
}

fn walk(node: &Value, table: &str, accesses: &mut Vec<Access>) {
    let text = |key: &str| node[key].as_str().unwrap_or_default();
    // What run-time pruning took away stands in the plan, but never runs.
    let runs = node["Actual Loops"].as_f64().is_none_or(|loops| loops > 0.0);
    let table = if text("Relation Name").is_empty() { table } else { text("Relation Name") };
    if runs {
        match text("Node Type") {
            "Index Scan" | "Index Only Scan" | "Bitmap Index Scan" => accesses.push(Access {
                table: table.into(),
                index: Some(text("Index Name").into()),
                condition: text("Index Cond").into(),
            }),
            "Bitmap Heap Scan" | "ModifyTable" => {}
            _ if text("Relation Name").is_empty() => {}
            _ => accesses.push(Access { table: table.into(), index: None, condition: String::new() }),
        }
    }
    for child in node["Plans"].as_array().into_iter().flatten() {
        walk(child, table, accesses);
    }
}

impl Explains for OnSqlite {
    async fn explain_from_now_on(&self) {}

    async fn plans(&self, told: Vec<String>) -> Vec<Plan> {
        let options: SqliteConnectOptions = self.url().parse().expect("a URL");
        let mut direct = options.disable_statement_logging().connect().await.expect("a connection");
        let statements: BTreeSet<String> = told
            .into_iter()
            .filter(|sql| ["SELECT", "INSERT", "UPDATE", "DELETE", "WITH"].iter().any(|verb| sql.starts_with(verb)))
            .collect();
        let mut plans = Vec::new();
        for sql in statements {
            let rows = sqlx::query(AssertSqlSafe(format!("EXPLAIN QUERY PLAN {sql}")))
                .fetch_all(&mut direct)
                .await
                .unwrap_or_else(|error| panic!("{error}: {sql}"));
            let details: Vec<String> = rows.iter().map(|row| row.get("detail")).collect();
            let accesses = details.iter().filter_map(|detail| access_of_detail(detail)).collect();
            plans.push(Plan { sql, accesses, compiled: false, text: details.join("\n") });
        }
        direct.close().await.expect("a goodbye");
        plans
    }
}

/// Reads a line of `EXPLAIN QUERY PLAN`; `None` where it reads no table of ours.
fn access_of_detail(detail: &str) -> Option<Access> {
    let (verb, rest) = detail.split_once(' ')?;
    let (table, how) = rest.split_once(' ').unwrap_or((rest, ""));
    let small = ["b", "buckets", "CONSTANT", "jobs", "watermarks"].contains(&table) || table.starts_with('(');
    if !matches!(verb, "SCAN" | "SEARCH") || small || how.starts_with("VIRTUAL TABLE") {
        return None;
    }
    let index = how.split_once("INDEX ").map(|(_, rest)| rest.split(' ').next().unwrap_or_default().to_owned());
    let index = if how.contains("PRIMARY KEY") { Some("PRIMARY KEY".to_owned()) } else { index };
    // An index that is made for one statement is made by reading the whole table.
    let index = index.filter(|_| !how.contains("AUTOMATIC"));
    let condition = how.split_once('(').map_or("", |(_, rest)| rest.trim_end_matches(')'));
    Some(Access { table: table.into(), index, condition: condition.into() })
}

impl Access {
    /// Whether a column is among what is looked up.
    pub fn looks_up(&self, column: &str) -> bool {
        self.condition.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == column)
    }

    /// Whether the table, or what this is a partition of, grows without bound: reading it from end to end is what no
    /// statement may do. `one` is the row beside which a statement looks for others.
    pub fn is_large(&self) -> bool {
        !["jobs", "watermarks", "guard_counts", "one"].iter().any(|small| self.table.starts_with(small))
    }

    /// The table that this is a partition of.
    pub fn family(&self) -> &str {
        self.table.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches('_')
    }
}
