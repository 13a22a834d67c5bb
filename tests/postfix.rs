//! A real Postfix takes our mail: it wants STARTTLS and an account, delivers to a mailbox, and refuses an address.
//!
//! It is an instance of this test's own, in the test's directory and on a port of 127.0.0.1; nothing of the machine's
//! Postfix is read, written or started but its programs. These must be started as root. Where this process is not, or a
//! program is missing, the test is skipped, and says so on stderr past what `cargo test` keeps to itself.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use mail_parser::MessageParser;
use rand::RngExt;
use tempfile::TempDir;

use crate::support::cli::{PATIENCE, Place, eventually, fact};
use crate::support::smtp::id_of;

const PROGRAMS: [&str; 3] = ["/usr/sbin/postfix", "/usr/lib/postfix/sbin/master", "/usr/sbin/saslpasswd2"];

const PASSWORD: &str = "open sesame";

/// How long it may take to start, and to end.
const STARTS_WITHIN: Duration = Duration::from_secs(30);

/// Starts the server, and ends it when standard input ends, which it also does when the test is killed; or at a signal.
const KEEPER: &str = r#"
    trap : TERM INT HUP
    /usr/sbin/postfix -c "$1/etc" start-fg </dev/null >"$1/out" 2>&1 &
    read -r _
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        kill -TERM "$(cat "$1/spool/pid/master.pid")" && break
        sleep 0.2
    done
    wait
"#;

/// Why there can be no server here, if so.
fn missing() -> Option<String> {
    let me = Command::new("id").arg("-u").output().expect("the command id");
    if me.stdout != b"0\n" {
        return Some("Postfix must be started as root".into());
    }
    PROGRAMS.iter().find(|program| !Path::new(program).exists()).map(|program| format!("there is no {program}"))
}

/// A running Postfix for mail to example.org, where ann has a mailbox and nobody else.
struct Postfix {
    home: TempDir,
    port: u16,
    keeper: Child,
    /// Open as long as it shall run.
    alive: Option<ChildStdin>,
}

impl Postfix {
    fn start() -> Self {
        let home = TempDir::new().expect("a directory");
        let path = home.path().to_path_buf();
        // Its processes run as other users.
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("a directory");
        for (directory, user) in
            [("etc", "root"), ("etc/sasl", "root"), ("spool", "root"), ("data", "postfix"), ("mail", "nobody")]
        {
            std::fs::create_dir(path.join(directory)).expect("a directory");
            chown(path.join(directory), Some(id_of("-u", user)), None).expect("chown");
        }
        certify(&path);
        add_account(&path);
        let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
        let ports = std::iter::repeat_with(|| rand::rng().random_range(20_000..32_000));
        let port = ports.take(100).find(free).expect("a free port");
        configure(&path, port);
        let mut keeper = Command::new("sh");
        keeper.args(["-c", KEEPER, "sh"]).arg(&path).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut keeper = keeper.spawn().expect("sh");
        let alive = keeper.stdin.take();
        let mut server = Self { home, port, keeper, alive };
        eventually("Postfix listens", STARTS_WITHIN, || {
            let ended = server.keeper.try_wait().expect("a child");
            assert!(ended.is_none(), "Postfix does not start: {}", server.log());
            TcpStream::connect(("127.0.0.1", port)).is_ok().then_some(())
        });
        server
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn log(&self) -> String {
        ["out", "log"].map(|name| std::fs::read_to_string(self.path(name)).unwrap_or_default()).concat()
    }

    /// What was delivered to ann.
    fn mails(&self) -> Vec<Vec<u8>> {
        let Ok(entries) = std::fs::read_dir(self.path("mail/ann/new")) else { return Vec::new() };
        entries.map(|entry| std::fs::read(entry.expect("an entry").path()).expect("a mail")).collect()
    }
}

impl Drop for Postfix {
    fn drop(&mut self) {
        drop(self.alive.take());
        let _ = self.keeper.wait();
    }
}

/// A certificate for this machine, and its key.
fn certify(home: &Path) {
    let made = Command::new("openssl")
        .current_dir(home)
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=mx.example.org", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout", "key.pem", "-out", "cert.pem"])
        .output()
        .expect("the command openssl");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// The account "tokens".
fn add_account(home: &Path) {
    let mut command = Command::new("/usr/sbin/saslpasswd2");
    command.args(["-p", "-c", "-u", "example.org", "-f"]).arg(home.join("accounts")).arg("tokens");
    let mut child = command.stdin(Stdio::piped()).spawn().expect("saslpasswd2");
    child.stdin.take().expect("a pipe").write_all(PASSWORD.as_bytes()).expect("a password");
    assert!(child.wait().expect("a child").success());
    chown(home.join("accounts"), Some(id_of("-u", "postfix")), None).expect("chown");
}

fn configure(home: &Path, port: u16) {
    let nobody = id_of("-u", "nobody");
    let write = |name: &str, text: String| std::fs::write(home.join("etc").join(name), text).expect("a file");
    let home = home.display();
    write(
        "main.cf",
        format!(
            "compatibility_level = 3.6\n\
             queue_directory = {home}/spool\n\
             data_directory = {home}/data\n\
             command_directory = /usr/sbin\n\
             daemon_directory = /usr/lib/postfix/sbin\n\
             maillog_file = {home}/log\n\
             maillog_file_prefixes = {home}\n\
             inet_interfaces = 127.0.0.1\n\
             inet_protocols = ipv4\n\
             myhostname = mx.example.org\n\
             mydestination =\n\
             alias_maps =\n\
             virtual_mailbox_domains = example.org\n\
             virtual_mailbox_base = {home}/mail\n\
             virtual_mailbox_maps = inline:{{ {{ ann@example.org = ann/ }} }}\n\
             virtual_minimum_uid = 1\n\
             virtual_uid_maps = static:{nobody}\n\
             virtual_gid_maps = static:{nobody}\n\
             smtpd_tls_security_level = encrypt\n\
             smtpd_tls_cert_file = {home}/cert.pem\n\
             smtpd_tls_key_file = {home}/key.pem\n\
             smtpd_tls_received_header = yes\n\
             smtpd_sasl_auth_enable = yes\n\
             smtpd_sasl_local_domain = example.org\n\
             smtpd_sasl_authenticated_header = yes\n\
             cyrus_sasl_config_path = {home}/etc/sasl\n\
             smtpd_recipient_restrictions = permit_sasl_authenticated, reject\n"
        ),
    );
    let accounts = format!("auxprop_plugin: sasldb\nsasldb_path: {home}/accounts\n");
    write("sasl/smtpd.conf", format!("pwcheck_method: auxprop\nmech_list: PLAIN LOGIN\n{accounts}"));
    let services = [
        ("cleanup", "unix n - n - 0 cleanup"),
        ("qmgr", "unix n - n 300 1 qmgr"),
        ("tlsmgr", "unix - - n 1000? 1 tlsmgr"),
        ("rewrite", "unix - - n - - trivial-rewrite"),
        ("bounce", "unix - - n - 0 bounce"),
        ("defer", "unix - - n - 0 bounce"),
        ("trace", "unix - - n - 0 bounce"),
        ("anvil", "unix - - n - 1 anvil"),
        ("proxymap", "unix - - n - - proxymap"),
        ("error", "unix - - n - - error"),
        ("retry", "unix - - n - - error"),
        ("virtual", "unix - n n - - virtual"),
        ("postlog", "unix-dgram n - n - 1 postlogd"),
    ];
    let services: String = services.iter().map(|(name, how)| format!("{name} {how}\n")).collect();
    write("master.cf", format!("127.0.0.1:{port} inet n - n - - smtpd\n{services}"));
}

#[test]
fn a_real_postfix_takes_what_it_should_and_refuses_the_rest() {
    if let Some(why) = missing() {
        // Not println: its output is kept back where a test passes.
        writeln!(std::io::stderr(), "SKIPPED: no test with a real Postfix, because {why}").expect("stderr");
        return;
    }
    let server = Postfix::start();
    let place = Place::new();
    place.configure(&format!(
        r#"
        [mail]
        transport = "smtp"
        from = "Tokens <tokens@example.org>"
        [mail.smtp]
        host = "127.0.0.1"
        port = {}
        tls = "starttls"
        ca_file = {:?}
        username = "tokens"
        password_file = "password"
        "#,
        server.port,
        server.path("cert.pem"),
    ));
    place.owner("ann", "ann@example.org");
    place.owner("gone", "gone@example.org");
    let tokens = ["ann", "gone"].map(|owner| place.token(owner, "CI", "1s"));
    for (_, secret) in &tokens {
        eventually("the deadline", PATIENCE, || (place.verify(secret).status == Some(1)).then_some(()));
    }

    // A wrong password is nobody's fault but the operator's: messages wait.
    place.write("password", "wrong\n");
    let refused = place.line("run --once");
    assert_eq!(refused.status, Some(1), "{refused}");
    assert!(refused.stderr.contains("AUTH: 535 5.7.8"), "{refused}\n{}", server.log());
    assert!(server.mails().is_empty());

    place.write("password", &format!("{PASSWORD}\n"));
    let once = place.line("run --once");
    assert_eq!(fact(&once.stdout, "deliver"), "messages sent: 1, given up: 1", "{once}\n{}", server.log());
    let mails = eventually("the mailbox", PATIENCE, || Some(server.mails()).filter(|mails| !mails.is_empty()));
    assert_eq!(mails.len(), 1);
    let text = String::from_utf8_lossy(&mails[0]).into_owned();
    assert!(text.contains("with ESMTPSA") && text.contains("(Authenticated sender: tokens"), "{text}");
    let mail = MessageParser::default().parse(&mails[0]).expect("a mail");
    assert_eq!(mail.subject(), Some("\"CI\" expired today"));
    assert_eq!(mail.return_path().as_text(), Some("tokens@example.org"));
    let sent = place.run(["token", "show", &tokens[0].0]).ok();
    assert!(sent.contains("  sent  "), "{sent}");

    // The other address is known to be dead, and by which words.
    let contacts = place.line("owner contact list gone --format json").ok();
    assert!(contacts.contains("550 5.1.1 <gone@example.org>: Recipient address rejected"), "{contacts}");
    let failed = place.run(["token", "show", &tokens[1].0]).ok();
    assert!(failed.contains("  failed  "), "{failed}");
    assert_eq!(fact(&place.line("run --once").ok(), "deliver"), "nothing was due");
}
