//! Where a client starts from: the nodes file, or a list of addresses.

use std::path::Path;

use http::uri::Authority;

use crate::client_error::ClientError;

/// The largest nodes file that is read: [`CLUSTERS_MAX`](crate::ring::CLUSTERS_MAX) clusters of
/// [`NODES_PER_CLUSTER_MAX`](crate::ring::NODES_PER_CLUSTER_MAX) nodes take about 1 MiB, unless their
/// names are long. Protects against naming some other file by mistake.
const NODES_FILE_BYTES_MAX: u64 = 16 << 20;

/// The HTTP addresses (`HOST:PORT`) that a client is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoints {
    /// One list of nodes for each cluster.
    Clusters(Vec<Vec<String>>),
    /// Nodes of any clusters, in any order.
    Flat(Vec<String>),
}

impl From<Vec<Vec<String>>> for Endpoints {
    fn from(clusters: Vec<Vec<String>>) -> Self {
        Self::Clusters(clusters)
    }
}

impl From<Vec<String>> for Endpoints {
    fn from(nodes: Vec<String>) -> Self {
        Self::Flat(nodes)
    }
}

impl Endpoints {
    /// Reads a nodes file such as `all_nodes.json`: a JSON list of clusters, each a list of its
    /// nodes' addresses.
    pub(super) async fn from_file(path: &Path) -> Result<Self, ClientError> {
        let unusable = |message: String| ClientError::NodesFile { path: path.into(), message };
        let size =
            tokio::fs::metadata(path).await.map_err(|error| unusable(error.to_string()))?.len();
        if size > NODES_FILE_BYTES_MAX {
            return Err(unusable(format!("it has {size} bytes, more than any list of nodes")));
        }
        let text = tokio::fs::read(path).await.map_err(|error| unusable(error.to_string()))?;
        let clusters: Vec<Vec<String>> = serde_json::from_slice(&text).map_err(|error| {
            unusable(format!("a JSON list of lists of addresses is needed: {error}"))
        })?;
        let endpoints = Self::Clusters(clusters);
        endpoints.check().map_err(unusable)?;
        Ok(endpoints)
    }

    /// Whether there is somebody to ask, and every address has a host and a port. Says what is wrong.
    pub fn check(&self) -> Result<(), String> {
        if let Self::Clusters(clusters) = self
            && let Some(empty) = clusters.iter().position(Vec::is_empty)
        {
            return Err(format!("cluster {} of the list has no nodes", empty + 1));
        }
        if self.addresses().next().is_none() {
            return Err("the list of nodes is empty".to_owned());
        }
        match self.addresses().find(|address| !is_address(address)) {
            Some(bad) if bad.is_empty() => Err("an address is empty".to_owned()),
            Some(bad) => Err(format!("`{}` is not a HOST:PORT", bad.escape_default())),
            None => Ok(()),
        }
    }

    pub(super) fn addresses(&self) -> Box<dyn Iterator<Item = &String> + Send + '_> {
        match self {
            Self::Clusters(clusters) => Box::new(clusters.iter().flatten()),
            Self::Flat(nodes) => Box::new(nodes.iter()),
        }
    }

    /// Lists of nodes of which each is asked as if it were one cluster.
    pub(super) fn groups(&self) -> Vec<Vec<String>> {
        match self {
            Self::Clusters(clusters) => clusters.clone(),
            Self::Flat(nodes) => vec![nodes.clone()],
        }
    }
}

fn is_address(text: &str) -> bool {
    let authority = text.parse::<Authority>().ok();
    authority.is_some_and(|a| a.port_u16().is_some() && !a.host().is_empty() && !text.contains('@'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(nodes: &[&str]) -> Endpoints {
        Endpoints::Flat(nodes.iter().map(|node| (*node).to_owned()).collect())
    }

    #[test]
    fn what_is_no_address_is_refused_by_name() {
        assert_eq!(flat(&["127.0.0.1:1", "host:2", "[::1]:3"]).check(), Ok(()));
        for bad in ["", "host", "http://host:1", ":1", "host:", "host:99999", "a b:1", "u@h:1"] {
            assert!(flat(&["127.0.0.1:1", bad]).check().unwrap_err().contains(bad), "{bad}");
        }
        assert!(flat(&[]).check().is_err());
        assert!(Endpoints::Clusters(vec![vec!["h:1".into()], vec![]]).check().is_err());
    }

    #[tokio::test]
    async fn an_unusable_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("all_nodes.json");
        let missing = Endpoints::from_file(&path).await.unwrap_err();
        assert!(matches!(&missing, ClientError::NodesFile { path: named, .. } if *named == path));
        for garbled in ["", "{}", "[\"h:1\"]", "[]", "[[]]", "[[\"h\"]]", "[[\"h:1\"]"] {
            std::fs::write(&path, garbled).unwrap();
            let error = Endpoints::from_file(&path).await.unwrap_err();
            assert!(matches!(error, ClientError::NodesFile { .. }), "{garbled}");
        }
        std::fs::write(&path, "[[\"h:1\"]]").unwrap();
        let read = Endpoints::from_file(&path).await.unwrap();
        assert_eq!(read, Endpoints::Clusters(vec![vec!["h:1".into()]]));
    }
}
