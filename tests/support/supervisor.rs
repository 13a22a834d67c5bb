//! Who listens to what a daemon notifies, as systemd does.

use std::os::unix::net::UnixDatagram;
use std::time::Instant;

use super::cli::{PATIENCE, Place};

/// What a daemon tells its supervisor.
pub struct Supervisor(UnixDatagram);

impl Supervisor {
    /// Of the daemons that this place starts from now on.
    pub fn of(place: &mut Place) -> Self {
        let socket = UnixDatagram::bind(place.path("notify")).expect("a socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let path = place.path("notify").display().to_string();
        place.set("NOTIFY_SOCKET", &path);
        Self(socket)
    }

    /// Waits for a line that begins like this.
    #[track_caller]
    pub fn hear(&self, wanted: &str) -> String {
        let start = Instant::now();
        let mut buffer = [0; 1024];
        loop {
            let length = self.0.recv(&mut buffer).unwrap_or_else(|error| panic!("waiting for {wanted}: {error}"));
            let said = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if let Some(line) = said.lines().find(|line| line.starts_with(wanted)) {
                return line.to_owned();
            }
            assert!(start.elapsed() < PATIENCE, "{wanted} never came");
        }
    }

    /// Forgets what was said up to now.
    pub fn forget(&self) {
        self.0.set_nonblocking(true).expect("a flag");
        while self.0.recv(&mut [0; 1024]).is_ok() {}
        self.0.set_nonblocking(false).expect("a flag");
    }
}
