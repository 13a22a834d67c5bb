use proptest::prelude::*;

use super::*;

fn read(text: &str) -> Vec<(u64, Result<String, String>)> {
    let list = List::open(io::Cursor::new(text.as_bytes().to_vec())).expect("a list");
    list.map(|row| row.expect("readable"))
        .map(|(line, row)| {
            let row = row.map(|row| {
                let emails: Vec<&str> = row.addresses.iter().map(crate::token::Address::as_str).collect();
                format!("{} | {} | {} | {:?}", row.owner_key, row.external_id, emails.join(" "), row.expires)
            });
            (line, row)
        })
        .collect()
}

fn refused(text: &str) -> String {
    List::open(io::Cursor::new(text.as_bytes().to_vec())).err().expect("no list").to_string()
}

#[test]
fn a_csv_with_columns_in_any_order_and_bad_rows() {
    let rows = read(
        "\u{feff}Expires_At,owner,colour,description,emails,external_id\r\n\
         2027-01-31,alice,red,\"deploy key, CI\",A@example.org; b@example.org,17\r\n\
         soon,bob,,x,,18\r\n\
         ,carol,,y,,\r\n\
         a,b\r\n\
         2027-02-30,dave,,z,,19\r\n",
    );
    assert_eq!(rows.len(), 5);
    assert_eq!(rows[0], (2, Ok("alice | 17 | a@example.org b@example.org | EndOf(2027-01-31)".into())));
    assert_eq!(rows[2], (4, Ok("carol | y |  | Never".into())), "the description stands for the external id");
    for (at, line, why) in [(1, 3, "expires_at: \"soon\" is not"), (3, 5, "2 fields"), (4, 6, "no such day")] {
        assert_eq!(rows[at].0, line);
        let problem = rows[at].1.clone().expect_err("bad");
        assert!(problem.contains(why), "{problem}");
    }
}

#[test]
fn unknown_columns_are_named() {
    let list = List::open(io::Cursor::new(b"owner,description,expires_at,shoe size\n".to_vec())).expect("a list");
    assert_eq!(list.unknown_columns(), ["shoe size"]);
    assert_eq!(
        ["Email", "expires", "created", "shoe size"].map(meant_column),
        [Some("emails"), Some("expires_at"), Some("created_at"), None]
    );
}

#[test]
fn json_lines_with_lists_numbers_and_nothing() {
    let rows = read(
        "{\"owner\":\"alice\",\"description\":\"ci\",\"expires_at\":\"2027-01-31T09:00:00Z\",\"external_id\":7,\
         \"emails\":[\"a@example.org\",\"b@example.org\"],\"extra\":{}}\n\n\
         {\"owner\":\"bob\",\"description\":\"x\",\"expires_at\":null}\n\
         {\"owner\":\"bob\",\"description\":\"x\"}\n\
         nonsense\n",
    );
    assert_eq!(rows[0], (1, Ok("alice | 7 | a@example.org b@example.org | At(2027-01-31T09:00:00Z)".into())));
    assert_eq!(rows[1], (3, Ok("bob | x |  | Never".into())));
    assert_eq!(rows[2], (4, Err("it has no \"expires_at\"".into())));
    assert!(rows[3].1.clone().is_err_and(|problem| problem.contains("not a JSON object")));
}

#[test]
fn what_is_no_list_says_so() {
    assert!(refused("").contains("empty"));
    assert!(refused("  \n").contains("empty"));
    assert!(
        refused("owner,description\n")
            .contains("no column \"expires_at\"; its first line is \"owner,description\", where")
    );
    for (text, why) in [
        ("onwer,description,expires_at\n", "no column \"owner\"; is \"onwer\" meant to be that?"),
        (
            "owner;description;expires_at\n",
            "\"owner;description;expires_at\": separate columns with commas, not with semicolons",
        ),
        ("owner\tdescription\texpires_at\n", "commas, not with tabs"),
        (
            "alice,ci,2027-01-31\n",
            "its first line is \"alice,ci,2027-01-31\", where a CSV names its columns: owner, description, ",
        ),
        ("PK\u{3}\u{4}x", "is a ZIP archive or a spreadsheet; save it as CSV first"),
    ] {
        assert!(refused(text).contains(why), "{}", refused(text));
    }
    for (bytes, why) in
        [(&b"\x1f\x8b\x08"[..], "is compressed"), (b"\xff\xfeo\0w\0", "is UTF-16"), (b"\xfe\xff\0o", "is UTF-16")]
    {
        let error = List::open(io::Cursor::new(bytes.to_vec())).err().expect("no list").to_string();
        assert!(error.starts_with(why), "{error}");
    }
    assert!(refused("owner,owner,description,expires_at\n").contains("two columns \"owner\""));
    assert!(refused("[{}]").contains("jq -c '.[]'"));
}

#[test]
fn a_quote_that_never_closes_does_not_fill_the_memory() {
    let endless = std::io::repeat(b'x').take(100 << 20);
    let text = io::Cursor::new(b"owner,description,expires_at\nalice,\"".to_vec()).chain(endless);
    let mut list = List::open(text).expect("a list");
    assert!(matches!(list.next(), Some(Err(ListError::EndlessRow(_)))));
    assert!(list.next().is_none());
}

#[test]
fn a_broken_encoding_is_one_bad_row() {
    let bytes = b"owner,description,expires_at\nalice,\xff\xfe,\nbob,ok,\n".to_vec();
    let rows: Vec<_> =
        List::open(io::Cursor::new(bytes)).expect("a list").map(|row| row.expect("readable").1).collect();
    assert_eq!(rows[0].as_ref().expect_err("bad"), "its text is not UTF-8");
    assert!(rows[1].is_ok());
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic_and_come_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        if let Ok(list) = List::open(io::Cursor::new(bytes.clone())) {
            prop_assert!(list.count() <= bytes.len());
        }
        for header in ["owner,description,expires_at,emails,external_id,created_at\n", "{"] {
            let mut text = header.as_bytes().to_vec();
            text.extend(&bytes);
            if let Ok(list) = List::open(io::Cursor::new(text)) {
                prop_assert!(list.count() <= bytes.len() + 1);
            }
        }
    }
}
