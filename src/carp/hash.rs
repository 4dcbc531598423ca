//! The hashes of both versions: of a key, of a member, and of the two together.
//!
//! Each version has the same three steps, so that a lookup reads the key once and then spends a
//! few instructions per member:
//!
//! ```text
//!              version 1 (the draft, 3.1 and 3.2)        version 2
//! key          h += rotl(h, 19) + byte, from 0           xxh3_64(key)
//! member       as a key, then scramble                   xxh3_64(id, seed MEMBER_SEED)
//! together     scramble(key ^ member)                    mix13(key ^ member)
//! scramble(h)  h += h * 0x62531965; rotl(h, 21)
//! ```
//!
//! Version 1 lets similar keys stay similar: its byte loop carries a difference only upwards and
//! through one rotation, and one multiplication cannot make up for that. Version 2 takes a
//! published hash for the bytes and a published finaliser for the combination. Hashing the key
//! again for every member (seeded by it) would be as even, but costs several times more for
//! each member.
//!
//! Neither version defends against a client that picks its keys so that they all land on one
//! member: both hashes are public and have no secret.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// The constant of the draft, sections 3.1 and 3.2.
const DRAFT_MULTIPLIER: u32 = 0x6253_1965;

/// Sets member hashes apart from key hashes, so that a key that equals a member's id is a key
/// like any other (unseeded, their hashes would cancel out). Any constant does; this one is
/// 2^64 divided by the golden ratio.
const MEMBER_SEED: u64 = 0x9E37_79B9_7F4A_7C15;

/// The draft's hash of a key. The draft hashes ASCII text up to its terminating zero; here the
/// bytes are unsigned, all of them count, zero included, and none is changed to lower case:
/// only a URL's scheme and host ignore case, and a key is not a URL.
pub(super) fn v1_key(key: &[u8]) -> u32 {
    key.iter().fold(0, |hash, &byte| v1_step(hash, byte))
}

/// The draft's hash of a member, whose name it takes in lower case since host names ignore it.
/// Only ASCII letters change.
pub(super) fn v1_member(id: &str) -> u32 {
    let lower_case = id.bytes().map(|byte| byte.to_ascii_lowercase());
    v1_scramble(lower_case.fold(0, v1_step))
}

/// The draft's combined hash, which the load multiplier then scales to a score.
pub(super) fn v1_combine(key_hash: u32, member_hash: u32) -> u32 {
    v1_scramble(key_hash ^ member_hash)
}

fn v1_step(hash: u32, byte: u8) -> u32 {
    hash.wrapping_add(hash.rotate_left(19)).wrapping_add(u32::from(byte))
}

fn v1_scramble(hash: u32) -> u32 {
    hash.wrapping_add(hash.wrapping_mul(DRAFT_MULTIPLIER)).rotate_left(21)
}

/// Version 2's hash of a key.
pub(super) fn v2_key(key: &[u8]) -> u64 {
    xxh3_64(key)
}

/// Version 2's hash of a member: of the id's bytes as they are, case included.
pub(super) fn v2_member(id: &str) -> u64 {
    xxh3_64_with_seed(id.as_bytes(), MEMBER_SEED)
}

/// Version 2's combined hash: 64 bits, uniform over keys for each member, and as good as
/// independent between members.
pub(super) fn v2_combine(key_hash: u64, member_hash: u64) -> u64 {
    mix13(key_hash ^ member_hash)
}

/// The finaliser of SplitMix64, which is David Stafford's variant 13 of Murmur3's: a bijection
/// in which every input bit flips every output bit with a probability close to one half.
fn mix13(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    // The constants of version 1 come from a Python script written from the draft's text, those
    // of version 2 from the reference C implementation of xxHash through its Python binding.
    // None was printed by this code.

    /// Worked by hand for "ab": 'a' leaves h = 0x61. Then rotl(0x61, 19) = 0x61 << 19 =
    /// 0x0308_0000, since 0x61 has 7 bits, and h = 0x61 + 0x0308_0000 + 0x62 = 0x0308_00C3.
    #[test]
    fn v1_hashes_a_key_as_the_draft_says() {
        assert_eq!(v1_key(b""), 0);
        assert_eq!(v1_key(b"a"), 0x61);
        assert_eq!(v1_key(b"ab"), 0x0308_00C3);
        assert_eq!(v1_key(b"user:00000042"), 0x3A04_1265);
        assert_eq!(v1_key(b"http://www.squid-cache.org"), 0x6474_1632);
    }

    /// Table C-2 of Duane Wessels, "Web Caching" (2001); the book prints the URL without its
    /// last slash.
    #[test]
    fn v1_agrees_with_the_published_key_hash() {
        assert_eq!(v1_key(b"http://www.squid-cache.org/"), 0x1607_3A01);
    }

    #[test]
    fn v1_takes_bytes_as_unsigned_and_does_not_stop_at_zero() {
        assert_eq!(v1_key(b"\xFF\x00\x80"), 0x0FF0_413F);
    }

    /// Worked by hand for "a": h = 0x61, so h + h * 0x62531965 = 0x61 * 0x62531966 =
    /// 0x25_417C_9FA6, of which 32 bits stay: 0x417C_9FA6. Rotated left by 21 its low 11 bits
    /// (0x7A6) come to the top and its high 21 bits (0x8_2F93) to the bottom:
    /// 0x7A6 << 21 | 0x8_2F93 = 0xF4C8_2F93.
    #[test]
    fn v1_hashes_a_member_as_the_draft_says() {
        assert_eq!(v1_member("a"), 0xF4C8_2F93);
        assert_eq!(v1_member("c1"), 0xDF0D_7355);
    }

    /// The four names and hashes are table C-1 of Duane Wessels, "Web Caching" (2001), printed
    /// there for those who verify an implementation of CARP.
    #[test]
    fn v1_agrees_with_the_published_member_hashes() {
        assert_eq!(v1_member("test1.ircache.net"), 0x9601_0320);
        assert_eq!(v1_member("test2.web-cache.com"), 0x8496_5F0F);
        assert_eq!(v1_member("test3.squid-cache.org"), 0x4F5D_7332);
        assert_eq!(v1_member("test4.packet-pushers.com"), 0xA79A_F670);
    }

    #[test]
    fn v1_ignores_the_case_of_members_but_not_of_keys() {
        assert_eq!(v1_member("TEST1.ircache.NET"), v1_member("test1.ircache.net"));
        assert_ne!(v1_key(b"A"), v1_key(b"a"));
    }

    #[test]
    fn v1_combines_as_the_draft_says() {
        assert_eq!(v1_combine(0x0308_00C3, 0xF4C8_2F93), 0x3C0E_4435);
    }

    #[test]
    fn v2_hashes_keys_and_members_with_xxh3() {
        assert_eq!(v2_key(b""), 0x2D06_8005_38D3_94C2);
        assert_eq!(v2_key(b"a"), 0xE6C6_32B6_1E96_4E1F);
        assert_eq!(v2_key(b"user:00000042"), 0x08BA_6420_B8A2_EEA6);
        assert_eq!(v2_member(""), 0x602B_0E2C_D666_2C8B);
        assert_eq!(v2_member("a"), 0x7B01_3EC7_3230_C3A1);
        assert_eq!(v2_member("c1"), 0x3914_FFBD_0733_8A39);
        assert_eq!(v2_combine(v2_key(b"user:00000042"), v2_member("c1")), 0xDFB5_0F93_DD2C_6BC7);
    }

    /// SplitMix64 started from 0 mixes exactly `MEMBER_SEED` first, and its first output is
    /// well known.
    #[test]
    fn v2_mixes_as_splitmix64_does() {
        assert_eq!(mix13(MEMBER_SEED), 0xE220_A839_7B1D_CDAF);
    }
}
