//! Base64 with the standard alphabet and padding (RFC 4648, section 4), for bytes in JSON.
//!
//! Some forty lines of our own because it is all of base64 that this project needs, and only where
//! people read and write by hand: no speed to be won. Strict: bits that stand for nothing must be 0
//! and padding must be there, so that there is one encoding of a thing.

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

pub(crate) fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let at = |place: usize| u32::from(group.get(place).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for place in 0..4 {
            // A group of n bytes has n + 1 digits.
            let digit = ALPHABET[(bits >> (18 - 6 * place) & 0x3f) as usize];
            text.push(if place <= group.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

/// The bytes, or `None` when `text` is no base64.
pub(crate) fn decode(text: &str) -> Option<Vec<u8>> {
    let groups = text.as_bytes().chunks_exact(4);
    if !groups.remainder().is_empty() {
        return None;
    }
    let last = groups.len().saturating_sub(1);
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for (number, group) in groups.enumerate() {
        let digits = group.iter().position(|byte| *byte == b'=').unwrap_or(4);
        let padded = group[digits..].iter().all(|byte| *byte == b'=');
        if !padded || digits < 2 || (digits < 4 && number != last) {
            return None;
        }
        let mut bits = 0;
        for byte in &group[..digits] {
            bits = bits << 6 | value_of(*byte)?;
        }
        bits <<= 6 * (4 - digits);
        let [_, decoded @ ..] = u32::to_be_bytes(bits);
        let (meant, beyond) = decoded.split_at(digits - 1);
        if beyond.iter().any(|byte| *byte != 0) {
            return None;
        }
        bytes.extend_from_slice(meant);
    }
    Some(bytes)
}

fn value_of(digit: u8) -> Option<u32> {
    let value = match digit {
        b'A'..=b'Z' => digit - b'A',
        b'a'..=b'z' => digit - b'a' + 26,
        b'0'..=b'9' => digit - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    };
    Some(u32::from(value))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// The test vectors of RFC 4648, section 10.
    #[test]
    fn it_is_the_base64_of_the_rfc() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(encode(bytes.as_bytes()), text);
            assert_eq!(decode(text).as_deref(), Some(bytes.as_bytes()));
        }
        assert_eq!(encode(&[0xfb, 0xff, 0xfe]), "+//+");
    }

    #[test]
    fn other_spellings_are_refused() {
        for bad in [
            "Z", "Zg", "Zg=", "Zh==", "Zm9=", "Z===", "====", "Zg==Zg==", "Z=g=", "Zm 9v",
            "Zm9v\n", "-_-_", "Zm9é",
        ] {
            assert_eq!(decode(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn bytes_come_back(bytes in vec(any::<u8>(), 0..50)) {
            prop_assert_eq!(decode(&encode(&bytes)), Some(bytes));
        }

        /// What decodes encodes to the same text again.
        #[test]
        fn any_text_never_panics(text in "[A-Za-z0-9+/=]{0,12}|.{0,12}") {
            if let Some(bytes) = decode(&text) {
                prop_assert_eq!(encode(&bytes), text);
            }
        }
    }
}
