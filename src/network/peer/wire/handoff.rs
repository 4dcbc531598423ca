//! The pages of a handoff. Their form is [`crate::handoff`]'s; here is what surrounds it.

use bytes::BufMut;

use super::Wire;
use crate::codec::{DecodeError, Reader, put_bytes};
use crate::handoff::{Page, PageRequest, Refused};

/// A page, or why the asked replica has none.
pub(in crate::network) type PageReply = Result<Page, Refused>;

const PAGE: u8 = 0;
const REFUSED: u8 = 1;

/// The longest refusal that is read: names of clusters and phases, and a short text.
const REFUSAL_BYTES_MAX: usize = 4 << 10;

impl Wire for PageRequest {
    fn encode(&self, out: &mut Vec<u8>) {
        PageRequest::encode(self, out);
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        PageRequest::decode(reader)
    }
}

impl Wire for PageReply {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Ok(page) => {
                out.put_u8(PAGE);
                page.encode(out);
            }
            Err(refused) => {
                out.put_u8(REFUSED);
                let json = serde_json::to_vec(refused).expect("texts and numbers serialize");
                put_bytes(&json, out);
            }
        }
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        match reader.u8()? {
            PAGE => Page::decode(reader).map(Ok),
            REFUSED => {
                let json = reader.bytes()?;
                let refused = (json.len() <= REFUSAL_BYTES_MAX)
                    .then(|| serde_json::from_slice(&json).ok())
                    .flatten();
                refused.map(Err).ok_or(DecodeError::Invalid { what: "refusal of a page" })
            }
            found => Err(DecodeError::Tag { what: "page reply", found }),
        }
    }
}
