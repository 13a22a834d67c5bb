//! The HTML of mails in a real browser: headless Chromium, at the width of a phone and at that of a window, by day and by
//! night. `tests/run` installs it where it may; where there is none, the test is skipped, and says so on stderr past what
//! `cargo test` keeps to itself.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::mails::{LANGUAGES, composer, contents, letter, now};

/// How long the browser may take for all mails.
const PATIENCE: Duration = Duration::from_secs(120);

/// Puts each page into a frame of each width, and writes what it finds into the document.
const SCRIPT: &str = r"
const luminance = ([r, g, b]) => {
    const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
};
const contrast = (a, b) => {
    const [x, y] = [luminance(a), luminance(b)].sort((x, y) => y - x);
    return (x + 0.05) / (y + 0.05);
};
const colour = text => text.match(/[\d.]+/g).map(Number);
const canvas = matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18] : [255, 255, 255];
function behind(element, view) {
    for (let e = element; e; e = e.parentElement) {
        const c = colour(view.getComputedStyle(e).backgroundColor);
        if (c.length < 4 || c[3] === 1) return c;
    }
    return canvas;
}
function look(frame) {
    const [doc, view] = [frame.contentDocument, frame.contentWindow];
    const texts = doc.createTreeWalker(doc.body, NodeFilter.SHOW_TEXT);
    let [worst, where, smallest] = [21, '', 100];
    while (texts.nextNode()) {
        if (!texts.currentNode.data.trim()) continue;
        const element = texts.currentNode.parentElement;
        const style = view.getComputedStyle(element);
        const ratio = contrast(colour(style.color), behind(element, view));
        if (ratio < worst) [worst, where] = [ratio, texts.currentNode.data.trim()];
        smallest = Math.min(smallest, parseFloat(style.fontSize));
    }
    return {
        overflow: doc.documentElement.scrollWidth - doc.documentElement.clientWidth,
        width: doc.documentElement.clientWidth,
        requests: view.performance.getEntriesByType('resource').map(entry => entry.name),
        loads: doc.querySelectorAll('[src], link, object, embed, iframe, [background]').length,
        contrast: worst, where, smallest,
        lang: doc.documentElement.lang,
        title: doc.title,
        headings: [...doc.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1]),
        unlabelled: doc.querySelectorAll('th:not([scope])').length,
    };
}
addEventListener('load', async () => {
    const found = [];
    for (const page of PAGES) for (const width of [360, 800]) {
        const frame = document.createElement('iframe');
        frame.style.cssText = `border: 0; width: ${width}px; height: 900px; color-scheme: light dark`;
        frame.srcdoc = page.html;
        const loaded = new Promise(done => frame.addEventListener('load', done, { once: true }));
        document.body.append(frame);
        await loaded;
        found.push({ name: page.name, ...look(frame) });
        frame.remove();
    }
    const dark = matchMedia('(prefers-color-scheme: dark)').matches;
    document.getElementById('found').textContent = JSON.stringify({ dark, found });
});";

/// The browser, if there is one.
fn browser() -> Option<PathBuf> {
    let named = std::env::var_os("LAPSED_TEST_CHROMIUM").filter(|path| !path.is_empty());
    named.map(PathBuf::from).filter(|path| path.exists())
}

/// What the browser finds in pages, by day or by night.
fn look(browser: &Path, pages: &[(String, String)], dark: bool) -> Vec<Value> {
    let home = TempDir::new().expect("a directory");
    let pages: Vec<Value> = pages.iter().map(|(name, html)| json!({ "name": name, "html": html })).collect();
    // Within a script, only its end tag means anything.
    let pages = Value::from(pages).to_string().replace("</", "<\\/").replace("<!--", "<\\!--");
    let page = format!(
        "<!DOCTYPE html><html style='color-scheme: light dark'><meta charset=utf-8><body><pre id=found></pre>\
         <script>const PAGES = {pages};{SCRIPT}</script></body></html>"
    );
    let path = home.path().join("look.html");
    std::fs::write(&path, page).expect("a page");
    let mut child = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
        .args([
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-extensions",
        ])
        .args(["--proxy-server=127.0.0.1:9", "--virtual-time-budget=60000", "--dump-dom"])
        .arg(format!("--blink-settings=preferredColorScheme={}", u8::from(!dark)))
        .arg(format!("--user-data-dir={}", home.path().join("profile").display()))
        .arg(format!("file://{}", path.display()))
        .env("HOME", home.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the browser starts");
    let mut stdout = child.stdout.take().expect("its output");
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    let began = Instant::now();
    while child.try_wait().expect("its status").is_none() {
        if began.elapsed() > PATIENCE {
            child.kill().expect("it is ours");
            child.wait().expect("it ends");
            panic!("the browser does not come to an end");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let dom = reader.join().expect("a reader").expect("its output");
    let found = dom.split_once("<pre id=\"found\">").and_then(|(_, rest)| rest.split_once("</pre>")).expect("a result");
    let unescaped = found.0.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
    let found: Value = serde_json::from_str(&unescaped).unwrap_or_else(|error| panic!("{error} in {unescaped:?}"));
    assert_eq!(found["dark"], dark, "the browser shows what was asked for");
    found["found"].as_array().expect("a list").clone()
}

#[test]
fn mails_are_read_on_a_phone_by_day_and_by_night() {
    let Some(browser) = browser() else {
        // Past the harness, which keeps what tests print to itself.
        let _ = writeln!(std::io::stderr(), "SKIPPED: browser::mails_are_read_on_a_phone: there is no Chromium");
        return;
    };
    let mut pages = Vec::new();
    for language in LANGUAGES {
        for (name, content) in contents() {
            let written = composer().write(&letter(content, language), now()).expect("written");
            pages.push((format!("{language}/{name}"), written.html));
        }
    }
    let control = "<!DOCTYPE html><html lang=en><title>x</title><body style='margin: 0; background: #fff'>\
                   <p style='color: #999; width: 500px; font-size: 9px'>x<img src='http://127.0.0.1:9/x.png'>";
    pages.push(("control".into(), control.into()));
    for dark in [false, true] {
        let found = look(&browser, &pages, dark);
        assert_eq!(found.len(), 2 * pages.len());
        let (controls, mails): (Vec<_>, Vec<_>) = found.into_iter().partition(|page| page["name"] == "control");
        // What the browser would say of a mail that is wrong.
        assert!(controls[0]["overflow"].as_f64() > Some(100.0) && controls[0]["width"] == 360, "{controls:?}");
        assert!(controls[0]["contrast"].as_f64() < Some(4.5) && controls[0]["loads"] == 1, "{controls:?}");
        assert_eq!(controls[0]["requests"], json!(["http://127.0.0.1:9/x.png"]));
        for page in mails {
            let says = |key: &str| page[key].as_f64().expect("a number");
            assert_eq!(says("overflow"), 0.0, "scrolls sideways: {page}");
            assert_eq!((&page["requests"], &page["loads"]), (&json!([]), &json!(0)), "fetches something: {page}");
            // WCAG 2.2, success criterion 1.4.3, level AA.
            assert!(says("contrast") >= 4.5, "hard to read: {page}");
            assert!(says("smallest") >= 14.0, "small: {page}");
            let language = page["name"].as_str().and_then(|name| name.split_once('/')).map(|(language, _)| language);
            assert_eq!(page["lang"].as_str(), language);
            assert!(page["title"].as_str().is_some_and(|title| !title.is_empty()), "{page}");
            assert_eq!(page["unlabelled"], 0, "{page}");
            let headings: Vec<i64> =
                page["headings"].as_array().expect("a list").iter().filter_map(Value::as_i64).collect();
            assert_eq!(headings.first(), Some(&1), "{page}");
            assert!(headings.windows(2).all(|pair| pair[1] <= pair[0] + 1 && pair[1] > 1), "{page}");
        }
    }
}
