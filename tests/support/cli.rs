//! The program as a user runs it: a directory of its own, a cleared environment, text in and text out.
//!
//! Every command gets `--config` with a file of its place, so that nothing of the machine is read. A [`Daemon`] is
//! killed by its own process id when it is dropped.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use chrono::NaiveDateTime;
use lapsed::clock::Timestamp;
use tempfile::TempDir;

/// The program under test.
pub const LAPSED: &str = env!("CARGO_BIN_EXE_lapsed");

/// Between two looks at what is waited for.
const POLL: Duration = Duration::from_millis(20);

/// How long a command, or what a test waits for without saying how long, may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A working directory with a configuration file, and the environment of the commands that run there.
pub struct Place {
    directory: TempDir,
    variables: Vec<(String, String)>,
    logs: std::cell::Cell<u32>,
}

impl Place {
    /// An empty directory; the store is the default one, `lapsed.db` in it.
    pub fn new() -> Self {
        let place = Self {
            directory: TempDir::new().expect("a temporary directory"),
            variables: Vec::new(),
            logs: std::cell::Cell::new(0),
        };
        place.configure("");
        place
    }

    /// The same with another store.
    pub fn with_store(url: &str) -> Self {
        let mut place = Self::new();
        place.set("LAPSED__STORE__URL", url);
        place
    }

    /// Sets an environment variable for the commands that follow.
    pub fn set(&mut self, name: &str, value: &str) {
        self.variables.retain(|(known, _)| known != name);
        self.variables.push((name.to_owned(), value.to_owned()));
    }

    /// Writes the configuration file.
    pub fn configure(&self, toml: &str) {
        self.write("lapsed.toml", toml);
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn write(&self, name: &str, content: &str) {
        std::fs::write(self.path(name), content).expect("a file in the place");
    }

    /// The command without `--config`.
    pub fn bare<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(LAPSED);
        command.args(arguments).current_dir(self.directory.path()).env_clear();
        command.env("TMPDIR", self.directory.path());
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }

    fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.bare(["--config", "lapsed.toml"]);
        command.args(arguments);
        command
    }

    /// Runs `lapsed` with these arguments and nothing on its standard input.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Ran {
        self.run_with(arguments, "")
    }

    /// Runs `lapsed` with this text on its standard input.
    pub fn run_with<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>, stdin: &str) -> Ran {
        finish(self.command(arguments), stdin)
    }

    /// Runs a command line without quoting: words apart from spaces.
    pub fn line(&self, words: &str) -> Ran {
        self.run(words.split_whitespace())
    }

    /// Starts `lapsed` with these arguments, its log in a file.
    pub fn spawn<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Daemon {
        self.start(self.command(arguments))
    }

    fn start(&self, mut command: Command) -> Daemon {
        let number = self.logs.replace(self.logs.get() + 1);
        let log = self.path(&format!("daemon-{number}.log"));
        let stderr = File::create(&log).expect("a log file");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        Daemon { child: command.spawn().expect("the program starts"), log }
    }

    /// Starts the daemon and waits until it says so.
    pub fn daemon(&self) -> Daemon {
        let mut daemon = self.spawn(["run"]);
        daemon.wait_for_log("started");
        daemon
    }

    /// The same in the place of a shell that has run this script.
    pub fn daemon_after(&self, script: &str) -> Daemon {
        let program = self.command(["run"]);
        let mut command = Command::new("bash");
        command
            .args(["-c", &format!("{script}; exec \"$0\" \"$@\"")])
            .arg(program.get_program())
            .args(program.get_args());
        command.current_dir(self.directory.path()).env_clear();
        command.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let mut daemon = self.start(command);
        daemon.wait_for_log("started");
        daemon
    }

    /// An owner with one address, whose secret is returned.
    pub fn owner(&self, key: &str, address: &str) -> String {
        fact(&self.run(["owner", "add", key, "--email", address]).ok(), "secret")
    }

    /// A token for an owner: its id and its secret.
    pub fn token(&self, owner: &str, description: &str, expires: &str) -> (String, String) {
        let arguments = ["token", "create", "--owner", owner, "--description", description, "--expires", expires];
        let told = self.run(arguments).ok();
        (fact(&told, "token"), fact(&told, "secret"))
    }

    pub fn verify(&self, secret: &str) -> Ran {
        self.run_with(["token", "verify"], &format!("{secret}\n"))
    }

    /// Makes a store with nothing in it.
    pub fn empty_store(&self) {
        self.run_with(["token", "import", "-"], "owner,description,expires_at\n").ok();
    }

    /// The mails in the Maildir of this name, in the order of their arrival.
    pub fn mails(&self, maildir: &str) -> Vec<Vec<u8>> {
        use std::os::unix::fs::MetadataExt;
        let Ok(entries) = std::fs::read_dir(self.path(maildir).join("new")) else { return Vec::new() };
        let mut files: Vec<_> = entries
            .map(|entry| {
                let entry = entry.expect("an entry of the Maildir");
                let metadata = entry.metadata().expect("a file of the Maildir");
                (metadata.mtime(), metadata.mtime_nsec(), entry.path())
            })
            .collect();
        files.sort();
        files.iter().map(|(_, _, path)| std::fs::read(path).expect("a mail")).collect()
    }

    /// Every file below the directory.
    pub fn files(&self) -> Vec<PathBuf> {
        fn below(directory: &Path, found: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(directory).expect("a directory") {
                let path = entry.expect("an entry").path();
                if path.is_dir() { below(&path, found) } else { found.push(path) }
            }
        }
        let mut found = Vec::new();
        below(self.directory.path(), &mut found);
        found
    }
}

/// Runs a command to its end. A command that does not end is killed, and the test fails.
pub fn finish(mut command: Command, stdin: &str) -> Ran {
    let shown = format!("{:?}", command.get_args().collect::<Vec<_>>());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    // A program that does not read it may be gone already. Dropping the pipe ends the input.
    let _ = child.stdin.take().expect("a pipe").write_all(stdin.as_bytes());
    let output = child.wait_with_output().expect("the program ends");
    Ran::new(shown, output)
}

/// What a command did.
#[derive(Debug)]
pub struct Ran {
    arguments: String,
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    pub fn new(arguments: String, output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("the program prints UTF-8");
        let ran =
            Self { arguments, status: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
        assert!(!ran.stderr.contains("panicked"), "{ran}");
        assert!(!ran.stdout.contains('\u{1b}') && !ran.stderr.contains('\u{1b}'), "escape codes in a pipe: {ran}");
        ran
    }

    /// What it printed, after it ended well.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.status, Some(0), "{self}");
        self.stdout
    }

    /// What it complained of, after it ended with this status and printed no result.
    #[track_caller]
    pub fn fails(self, status: i32) -> String {
        assert_eq!((self.status, self.stdout.as_str()), (Some(status), ""), "{self}");
        assert!(!self.stderr.trim().is_empty(), "{self}");
        self.stderr
    }

    /// The reason of a verification that said no.
    #[track_caller]
    pub fn refused(self) -> String {
        assert_eq!(self.status, Some(1), "{self}");
        assert_eq!(fact(&self.stdout, "valid"), "no", "{self}");
        fact(&self.stdout, "reason")
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "lapsed {} ended with {:?}\n--- stdout\n{}--- stderr\n{}",
            self.arguments, self.status, self.stdout, self.stderr
        )
    }
}

/// A `lapsed` that runs on.
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).expect("the log")
    }

    /// The id under which it leases messages and jobs, once it has started.
    pub fn holder(&self) -> String {
        let log = self.log();
        let rest = log.split_once("process=").expect("it has started").1;
        rest.split_whitespace().next().expect("an id").to_owned()
    }

    /// Waits until the log holds this text.
    #[track_caller]
    pub fn wait_for_log(&mut self, text: &str) {
        eventually(text, PATIENCE, || {
            let log = self.log();
            let ended = self.child.try_wait().expect("the state of the daemon");
            assert!(ended.is_none(), "the daemon ended ({ended:?}) before it logged {text:?}:\n{log}");
            log.contains(text).then_some(())
        });
    }

    /// Of its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by its name.
    pub fn signal(&self, name: &str) {
        let id = self.child.id();
        let sent = Command::new("sh").args(["-c", &format!("kill -s {name} {id}")]).status().expect("sh");
        assert!(sent.success(), "kill -s {name} {id}");
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().expect("the daemon runs");
        self.child.wait().expect("the daemon ends");
    }

    /// Waits until it has ended, for so long at most.
    #[track_caller]
    pub fn ended(&mut self, within: Duration) -> ExitStatus {
        let log = self.log.clone();
        eventually(&format!("the end of the daemon of {}", log.display()), within, || {
            self.child.try_wait().expect("the state of the daemon")
        })
    }

    /// Stops it gracefully; its log is returned.
    #[track_caller]
    pub fn stop(mut self) -> String {
        self.signal("TERM");
        let status = self.ended(PATIENCE);
        let log = self.log();
        assert!(status.success(), "{status}:\n{log}");
        log
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Looks until there is something, for so long at most.
#[track_caller]
pub fn eventually<T>(what: &str, within: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < within, "waited {within:?} for: {what}");
        sleep(POLL);
    }
}

/// The value of a fact as commands print them: a name, two spaces or more, the value.
#[track_caller]
pub fn fact(text: &str, name: &str) -> String {
    let value = text.lines().find_map(|line| line.strip_prefix(name).filter(|rest| rest.starts_with("  ")));
    value.unwrap_or_else(|| panic!("no {name:?} in:\n{text}")).trim().to_owned()
}

/// The instant of a fact, which always stands there in UTC, too.
#[track_caller]
pub fn instant(text: &str, name: &str) -> Timestamp {
    let value = fact(text, name);
    let (before, _) = value.rsplit_once(" UTC").unwrap_or_else(|| panic!("no instant in {value:?}"));
    let from = before.len().checked_sub("2027-01-31 09:00:00".len()).expect("an instant");
    NaiveDateTime::parse_from_str(&before[from..], "%Y-%m-%d %H:%M:%S").expect(&value).and_utc()
}

/// The cells of a table's line, which stand two spaces apart or more.
pub fn cells(line: &str) -> Vec<&str> {
    line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect()
}

/// The short form of an id.
pub fn short(id: &str) -> String {
    let digits = id.replace('-', "");
    digits[digits.len() - 10..].to_owned()
}

/// What differs from run to run, as a shape: `#` is a digit, `x` a hexadecimal one, `*` a letter or digit.
const SHAPES: &[(&str, &str)] = &[
    ("lps_**************************************************", "[secret]"),
    ("xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx", "[id]"),
    ("####-##-## ##:##:##", "[instant]"),
    ("####-##-##T##:##:##Z", "[instant]"),
    ("xxxxxxxxxx", "[short id]"),
];

/// The text with ids, secrets and instants replaced.
pub fn scrub(text: &str) -> String {
    let fits = |rest: &[char], shape: &str| {
        shape.chars().enumerate().all(|(i, want)| {
            rest.get(i).is_some_and(|c| match want {
                '#' => c.is_ascii_digit(),
                'x' => c.is_ascii_digit() || ('a'..='f').contains(c),
                '*' => c.is_ascii_alphanumeric(),
                other => *c == other,
            })
        })
    };
    let chars: Vec<char> = text.chars().collect();
    let mut scrubbed = String::new();
    let mut at = 0;
    while at < chars.len() {
        let inside = at > 0 && chars[at - 1].is_ascii_alphanumeric();
        let found = SHAPES.iter().find(|(shape, _)| {
            let end = chars.get(at + shape.len());
            !inside && fits(&chars[at..], shape) && !end.is_some_and(char::is_ascii_alphanumeric)
        });
        match found {
            Some((shape, name)) => {
                scrubbed.push_str(name);
                at += shape.len();
            }
            None => {
                scrubbed.push(chars[at]);
                at += 1;
            }
        }
    }
    scrubbed
}
