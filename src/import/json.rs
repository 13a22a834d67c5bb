//! JSON lines: one object a line. Members that are not ours are ignored, as exports have many.

use std::io::{BufRead, Read};

use serde_json::{Map, Value};

use super::fields::{COLUMNS, Fields, NEEDED, row};
use super::{ListError, MAX_ROW, Row};

/// The rows of JSON lines.
pub(super) struct Lines<R> {
    input: R,
    line: u64,
    buffer: Vec<u8>,
    done: bool,
}

impl<R: BufRead> Lines<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, line: 0, buffer: Vec::new(), done: false }
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = Result<(u64, Row), ListError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.done {
            self.buffer.clear();
            self.line += 1;
            let read = (&mut self.input).take(MAX_ROW + 1).read_until(b'\n', &mut self.buffer);
            let failed = match read {
                Ok(0) => return None,
                Ok(count) if count as u64 > MAX_ROW => Some(ListError::EndlessRow(self.line)),
                Ok(_) => None,
                Err(error) => Some(error.into()),
            };
            if let Some(error) = failed {
                self.done = true;
                return Some(Err(error));
            }
            if self.buffer.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let object = serde_json::from_slice::<Map<String, Value>>(&self.buffer);
            let parsed = object
                .map_err(|error| format!("not a JSON object on one line: {error}"))
                .and_then(|object| fields(&object))
                .and_then(|fields| row(&fields));
            return Some(Ok((self.line, parsed)));
        }
        None
    }
}

fn fields(object: &Map<String, Value>) -> Result<Fields, String> {
    let mut fields = Fields::default();
    for (at, (name, field)) in COLUMNS.iter().zip(&mut fields).enumerate() {
        *field = match object.get(*name) {
            Some(value) => text(value).ok_or_else(|| format!("{name}: expected a text"))?,
            None if at < NEEDED => return Err(format!("it has no {name:?}")),
            None => String::new(),
        };
    }
    Ok(fields)
}

/// A text; a number as it is written; a list of texts joined by `;`, as several addresses are.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::Null => Some(String::new()),
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Array(values) => {
            let texts: Option<Vec<&str>> = values.iter().map(Value::as_str).collect();
            texts.map(|texts| texts.join(";"))
        }
        Value::Bool(_) | Value::Object(_) => None,
    }
}
