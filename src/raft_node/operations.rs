//! The operations on keys. The client of one cluster and that of all of them offer the same ones, and
//! differ only in how a call finds the cluster: so they are written, and documented, once.

/// Gives a client the operations on keys. It has `run(&self, key: &[u8], call: Call<'_>)`, which carries
/// a call to whoever serves it and returns the `Answer`, and `courier(&self)`, whose numbers its writes get.
///
/// A macro and no trait: these are the public methods of both types, and a trait would have to be
/// imported by everybody who calls them.
macro_rules! key_operations {
    ($client:ty) => {
        impl $client {
            /// Stores `value` under `key` and returns the revision.
            pub async fn write(
                &self,
                key: impl AsRef<[u8]>,
                value: impl AsRef<[u8]>,
            ) -> Result<Revision, ClientError> {
                self.write_if(key, value, Condition::Always).await
            }

            /// Stores `value` under `key` if `condition` holds, else
            /// [`ClientError::ConditionFailed`].
            pub async fn write_if(
                &self,
                key: impl AsRef<[u8]>,
                value: impl AsRef<[u8]>,
                condition: Condition,
            ) -> Result<Revision, ClientError> {
                let (key, value) = (key.as_ref(), value.as_ref());
                let call = Call::put(key, value, condition, self.courier().sequence());
                self.run(key, call).await?.written()
            }

            /// Removes `key`. That there was nothing to remove is no error.
            pub async fn delete(&self, key: impl AsRef<[u8]>) -> Result<Deleted, ClientError> {
                self.delete_if(key, Condition::Always).await
            }

            /// Removes `key` if `condition` holds, else [`ClientError::ConditionFailed`]. The server
            /// refuses [`Condition::Absent`], under which there is never anything to do.
            pub async fn delete_if(
                &self,
                key: impl AsRef<[u8]>,
                condition: Condition,
            ) -> Result<Deleted, ClientError> {
                let key = key.as_ref();
                let call = Call::delete(key, condition, self.courier().sequence());
                self.run(key, call).await?.deleted()
            }

            /// Reads from any node of the cluster that owns the key. The value may be old; `None`
            /// when the key is absent there.
            pub async fn read(&self, key: impl AsRef<[u8]>) -> Result<Option<Bytes>, ClientError> {
                Ok(self.get(key, Consistency::Stale).await?.map(|record| record.value))
            }

            /// Reads what the last acknowledged write left (linearizable); `None` when the key is
            /// absent.
            pub async fn consistent_read(
                &self,
                key: impl AsRef<[u8]>,
            ) -> Result<Option<Bytes>, ClientError> {
                Ok(self.get(key, Consistency::Linearizable).await?.map(|record| record.value))
            }

            /// Reads a value together with its revision.
            pub async fn get(
                &self,
                key: impl AsRef<[u8]>,
                consistency: Consistency,
            ) -> Result<Option<Record>, ClientError> {
                let key = key.as_ref();
                self.run(key, Call::get(key, consistency)).await?.record()
            }
        }
    };
}

pub(crate) use key_operations;
