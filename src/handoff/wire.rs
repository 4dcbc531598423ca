//! Bytes and shared rings in JSON. Bytes are base64, as everywhere in this project's JSON.

/// For `Bytes`.
pub(super) mod base64 {
    use bytes::Bytes;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::batch::base64::{decode, encode};

    pub(in crate::handoff) fn serialize<S: Serializer>(
        bytes: &Bytes,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&encode(bytes))
    }

    pub(in crate::handoff) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Bytes, D::Error> {
        let text = String::deserialize(deserializer)?;
        decode(&text).map(Bytes::from).ok_or_else(|| D::Error::custom("not base64"))
    }
}

/// For `Option<Bytes>`.
pub(super) mod base64_option {
    use bytes::Bytes;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::batch::base64::{decode, encode};

    pub(in crate::handoff) fn serialize<S: Serializer>(
        bytes: &Option<Bytes>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match bytes {
            Some(bytes) => serializer.serialize_some(&encode(bytes)),
            None => serializer.serialize_none(),
        }
    }

    pub(in crate::handoff) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Bytes>, D::Error> {
        let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
        decode(&text).map(|bytes| Some(bytes.into())).ok_or_else(|| D::Error::custom("not base64"))
    }
}

/// For `Arc<RingTable>`.
pub(super) mod table {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::ring::RingTable;

    pub(in crate::handoff) fn serialize<S: Serializer>(
        table: &Arc<RingTable>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        table.ring().serialize(serializer)
    }

    pub(in crate::handoff) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Arc<RingTable>, D::Error> {
        RingTable::deserialize(deserializer).map(Arc::new)
    }
}
