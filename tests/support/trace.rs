//! SQLite's own trace: what a process's connections execute, told before each statement.
//!
//! Every connection that this program opens after the first call is traced; those of files that nobody watches say
//! nothing. The one place in the tests that speaks to SQLite past sqlx, because no other seam sees BEGIN and COMMIT.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Arc, LazyLock, Mutex, Once, PoisonError};

use libsqlite3_sys::{
    SQLITE_OK, SQLITE_TRACE_STMT, sqlite3, sqlite3_api_routines, sqlite3_auto_extension, sqlite3_db_filename,
    sqlite3_db_handle, sqlite3_sql, sqlite3_stmt, sqlite3_trace_v2,
};

type Watcher = Arc<dyn Fn(&str) + Send + Sync>;

static WATCHERS: LazyLock<Mutex<HashMap<PathBuf, Watcher>>> = LazyLock::new(Mutex::default);

/// Traces the connections that are opened from now on.
pub fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: SQLite calls `trace_connection` with the arguments of an extension's entry point, which is its type.
        let entered = unsafe { sqlite3_auto_extension(Some(trace_connection)) };
        assert_eq!(entered, SQLITE_OK);
    });
}

/// Tells `watcher` of every statement on this file, before it is executed, until the value is dropped. The connection waits
/// for the watcher.
pub fn watch(file: &Path, watcher: impl Fn(&str) + Send + Sync + 'static) -> Watching {
    let file = file.canonicalize().expect("the file");
    WATCHERS.lock().unwrap_or_else(PoisonError::into_inner).insert(file.clone(), Arc::new(watcher));
    Watching(file)
}

/// A file that is watched.
pub struct Watching(PathBuf);

impl Drop for Watching {
    fn drop(&mut self) {
        WATCHERS.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

unsafe extern "C" fn trace_connection(
    connection: *mut sqlite3,
    _: *mut *mut c_char,
    _: *const sqlite3_api_routines,
) -> c_int {
    // SAFETY: SQLite has just opened the connection.
    unsafe {
        sqlite3_trace_v2(connection, SQLITE_TRACE_STMT, Some(told), ptr::null_mut());
    }
    SQLITE_OK
}

unsafe extern "C" fn told(_: c_uint, _: *mut c_void, statement: *mut c_void, _: *mut c_void) -> c_int {
    let statement: *mut sqlite3_stmt = statement.cast();
    // SAFETY: the event comes with a statement, which lives as long as this call; so do its text and its file's name.
    let (file, sql) = unsafe {
        let file = sqlite3_db_filename(sqlite3_db_handle(statement), c"main".as_ptr());
        let sql = sqlite3_sql(statement);
        if file.is_null() || sql.is_null() {
            return 0;
        }
        (CStr::from_ptr(file), CStr::from_ptr(sql))
    };
    let (Ok(file), Ok(sql)) = (file.to_str(), sql.to_str()) else { return 0 };
    let watcher = WATCHERS.lock().unwrap_or_else(PoisonError::into_inner).get(Path::new(file)).cloned();
    if let Some(watcher) = watcher {
        watcher(sql);
    }
    0
}
