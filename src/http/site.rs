//! What is answered: three pages of text.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::clock::Clock;
use crate::health::Health;
use crate::metrics::{Exposition, Metrics};
use crate::store::Store;

/// How long `/readyz` waits for the store.
const STORE: Duration = Duration::from_secs(3);

/// For how long the store's answer counts: many who ask at once are told the same.
const FRESH: Duration = Duration::from_secs(1);

/// The media type of OpenMetrics 1.0 (the OpenMetrics specification, "Text Format").
const OPEN_METRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// The media type of Prometheus' own text format.
const PROMETHEUS: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

const PLAIN: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// Tells which job hangs, if one does.
pub type Hangs = Box<dyn Fn() -> Option<&'static str> + Send + Sync>;

/// The pages, and what they are made of.
pub struct Site<S, C> {
    store: S,
    clock: C,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    hangs: Hangs,
    /// Whether the store answered, and when it was asked.
    answered: Mutex<Option<(Instant, bool)>>,
}

impl<S: Store, C: Clock> Site<S, C> {
    /// Pages about this store, by this clock.
    pub fn new(store: S, clock: C, metrics: Arc<Metrics>, health: Arc<Health>, hangs: Hangs) -> Self {
        Self { store, clock, metrics, health, hangs, answered: Mutex::new(None) }
    }

    /// Answers a request, whatever it is.
    pub async fn answer<B>(&self, request: &Request<B>) -> Response<Full<Bytes>> {
        let known = ["/healthz", "/readyz", "/metrics"];
        let path = request.uri().path();
        if !known.contains(&path) {
            let text = "there is nothing here; the pages are /healthz, /readyz and /metrics\n";
            return page(StatusCode::NOT_FOUND, PLAIN, text.to_owned());
        }
        if request.method() != Method::GET && request.method() != Method::HEAD {
            let mut answer = page(StatusCode::METHOD_NOT_ALLOWED, PLAIN, "ask with GET\n".to_owned());
            answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return answer;
        }
        match path {
            "/healthz" => self.healthz(),
            "/readyz" => self.readyz().await,
            _ => self.metrics(request.headers().get_all(ACCEPT).iter()),
        }
    }

    /// Whether the process does what it does.
    fn healthz(&self) -> Response<Full<Bytes>> {
        match (self.hangs)() {
            None => page(StatusCode::OK, PLAIN, "ok\n".to_owned()),
            Some(job) => page(StatusCode::SERVICE_UNAVAILABLE, PLAIN, format!("{job}: hangs\n")),
        }
    }

    /// Whether it does its job: one line for each thing that is wrong.
    async fn readyz(&self) -> Response<Full<Bytes>> {
        let mut wrong = String::new();
        if !self.store_answers().await {
            wrong.push_str("store: does not answer\n");
        }
        let now = self.clock.now();
        for job in self.health.jobs(now).into_iter().filter(|job| job.is_overdue()) {
            let minutes = job.due_for.num_minutes();
            // Writing to a String does not fail.
            let _ = write!(wrong, "{}: overdue for {minutes} min, ", job.job);
            let _ = match job.success {
                Some(success) => writeln!(wrong, "last went well at {}", success.format("%Y-%m-%dT%H:%M:%SZ")),
                None => writeln!(wrong, "has not gone well yet"),
            };
        }
        if wrong.is_empty() {
            page(StatusCode::OK, PLAIN, "ok\n".to_owned())
        } else {
            page(StatusCode::SERVICE_UNAVAILABLE, PLAIN, wrong)
        }
    }

    /// Asks the store for the records of the jobs, which is next to nothing; one question at a time, whoever asks.
    async fn store_answers(&self) -> bool {
        let mut answered = self.answered.lock().await;
        if let Some((_, answers)) = answered.filter(|(asked, _)| asked.elapsed() < FRESH) {
            return answers;
        }
        let answers = match tokio::time::timeout(STORE, self.store.job_records()).await {
            Ok(Ok(records)) => {
                self.health.recorded(&records);
                true
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "not ready: the store does not answer");
                false
            }
            Err(_) => {
                tracing::warn!(seconds = STORE.as_secs(), "not ready: the store does not answer in time");
                false
            }
        };
        *answered = Some((Instant::now(), answers));
        answers
    }

    fn metrics<'h>(&self, accepted: impl Iterator<Item = &'h HeaderValue>) -> Response<Full<Bytes>> {
        for job in self.health.jobs(self.clock.now()) {
            self.metrics.job(job.job, job.success, job.due_for);
        }
        match exposition(accepted) {
            Exposition::OpenMetrics => page(StatusCode::OK, OPEN_METRICS, self.metrics.text(Exposition::OpenMetrics)),
            Exposition::Prometheus => page(StatusCode::OK, PROMETHEUS, self.metrics.text(Exposition::Prometheus)),
        }
    }
}

/// OpenMetrics, except for those who name plain text and not OpenMetrics.
fn exposition<'h>(accepted: impl Iterator<Item = &'h HeaderValue>) -> Exposition {
    let accepted: Vec<&str> = accepted.filter_map(|value| value.to_str().ok()).collect();
    let names = |media: &str| accepted.iter().any(|value| value.contains(media));
    if names("text/plain") && !names("application/openmetrics-text") {
        Exposition::Prometheus
    } else {
        Exposition::OpenMetrics
    }
}

fn page(status: StatusCode, content: HeaderValue, text: String) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(Bytes::from(text)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, content);
    answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}
